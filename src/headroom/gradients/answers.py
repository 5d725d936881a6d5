"""Answers of the model under study to the paraphrased prompts: greedy, cut at the first end."""

import json
from collections.abc import Mapping
from pathlib import Path

from headroom.checkpoints import load_model, load_tokenizer
from headroom.corpora.generation import continuations, end_tokens
from headroom.corpora.instructions import read_samples
from headroom.errors import InputError
from headroom.gradients.encoding import begin, prompt_text
from headroom.progress import progress


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
    ends = end_tokens(model, tokenizer)
    size, found = max(1, own["batch"] >> halvings), {}
    for longest, part in progress(_batches(texts, own, size), "answers", unit="batch"):
        made = [None] * len(part)
        if longest > 0:
            made = continuations(model, [tokens for _, tokens in part], longest, ends)
        for (sample, _), answer in zip(part, made, strict=True):
            found[sample.id] = _row(sample, answer, tokenizer, ends)
    if all("skipped" in row for row in found.values()):
        raise InputError(
            f"config key gradients.length is {own['length']}: no prompt of {prompts} leaves room "
            f"for an answer"
        )
    lines = [json.dumps(found[s.id], ensure_ascii=False, sort_keys=True) for s, _ in texts]
    Path(output).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _batches(texts: list, own: Mapping, size: int) -> list[tuple[int, list]]:
    """Return batches of prompts whose answers may be equally long, with that length.

    So an answer's end hangs on its own prompt alone, not on the batch's longest. A length of 0 or
    less is a prompt that leaves no room.
    """
    by_length: dict[int, list] = {}
    for sample, tokens in sorted(texts, key=lambda pair: len(pair[1])):
        room = own["length"] - 1 - len(tokens)
        longest = max(0, min(own["answers"]["new_tokens"], room))
        by_length.setdefault(longest, []).append((sample, tokens))
    return [
        (longest, part[start : start + size])
        for longest, part in by_length.items()
        for start in range(0, len(part), size)
    ]


def _row(sample, answer: list[int] | None, tokenizer, ends: list[int]) -> dict:
    if answer is None:
        reason = "prompt without room for an answer"
        return {"id": sample.id, "prompt": sample.prompt, "answer": "", "skipped": reason}
    place = next((i for i, token in enumerate(answer) if token in ends), None)
    text = tokenizer.decode(answer[:place], skip_special_tokens=True)
    row = {"id": sample.id, "prompt": sample.prompt, "answer": text}
    return row if place is not None else row | {"ended": False}
