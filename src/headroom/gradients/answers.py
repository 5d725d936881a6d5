"""Answers of the model under study to the paraphrased prompts: greedy, cut at the first end."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from headroom.checkpoints import load_model, load_tokenizer
from headroom.corpora.instructions import read_samples
from headroom.errors import InputError
from headroom.gradients.encoding import begin, prompt_text


def write_answers(
    checkpoint: str, prompts: str, settings: Mapping, halvings: int, output: str
) -> None:
    """Write samples of the same ids and prompts, answered by the model.

    An answer that reaches the last allowed token without an end is marked ``"ended": false``.

    Args:
        checkpoint: folder of the model.
        prompts: file of the samples whose prompts are answered.
        settings: sections ``compute`` and ``gradients`` (template, length, batch, answers).
        halvings: how often the batch is halved.
        output: the file.

    Raises:
        InputError: where no prompt leaves room for an answer.
    """
    own, compute = settings["gradients"], settings["compute"]
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, compute["device"], compute["dtype"])
    texts = []
    for sample in read_samples(prompts):
        text, complete = prompt_text(sample.prompt, tokenizer, own["template"])
        texts.append((sample, begin(tokenizer, text, complete)))
    room = own["length"] - 1
    kept = [(sample, tokens) for sample, tokens in texts if len(tokens) < room]
    if not kept:
        raise InputError(
            f"config key gradients.length is {own['length']}: no prompt of {prompts} leaves room "
            f"for an answer"
        )
    kept.sort(key=lambda pair: len(pair[1]))
    size, found = max(1, own["batch"] >> halvings), {}
    for start in tqdm(range(0, len(kept), size), desc="answers", mininterval=5):
        part = kept[start : start + size]
        longest = min(own["answers"]["new_tokens"], room - max(len(tokens) for _, tokens in part))
        for (sample, _), answer in zip(part, _generate(model, part, max(1, longest)), strict=True):
            found[sample.id] = _row(sample, answer, tokenizer)
    lines = [
        json.dumps(found[s.id], ensure_ascii=False, sort_keys=True)
        for s, _ in texts
        if s.id in found
    ]
    Path(output).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _generate(model, part: list, longest: int) -> list[list[int]]:
    """Greedy continuations of prompts, padded on the left."""
    width = max(len(tokens) for _, tokens in part)
    tokens_nT = torch.zeros(len(part), width, dtype=torch.long)
    mask_nT = torch.zeros_like(tokens_nT)
    for row, (_, tokens) in enumerate(part):
        tokens_nT[row, width - len(tokens) :] = torch.tensor(tokens)
        mask_nT[row, width - len(tokens) :] = 1
    with torch.no_grad():
        made = model.generate(
            tokens_nT.to(model.device),
            attention_mask=mask_nT.to(model.device),
            generation_config=_greedy(model, longest),
        )
    return made[:, width:].tolist()


def _greedy(model, longest: int):
    """Greedy decoding whatever a checkpoint's own generation_config.json asks for."""
    from transformers import GenerationConfig

    config = model.generation_config
    end = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    pad = end[0] if isinstance(end, list) else end
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=longest,
        eos_token_id=end,
        pad_token_id=pad or 0,
    )


def _row(sample, answer: list[int], tokenizer) -> dict:
    ends = {tokenizer.eos_token_id}
    place = next((i for i, token in enumerate(answer) if token in ends), None)
    text = tokenizer.decode(answer[:place], skip_special_tokens=True)
    row = {"id": sample.id, "prompt": sample.prompt, "answer": text}
    return row if place is not None else row | {"ended": False}
