"""Samples as tokens: a template, the answer's place, and a reason for each that is left out."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from headroom.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "<|user|>\n{prompt}\n<|assistant|>\n"
TODAY = "26 Jul 2024"  # for chat templates that print the date: the same tokens every day
DATED = "{%- macro strftime_now(form) -%}" + TODAY + "{%- endmacro -%}"


class Encoded(NamedTuple):
    """A set of samples as a model reads them, in the corpus's order."""

    ids: list[str]
    samples: list[tuple[list[int], int]]  # tokens, place of the first answer token
    skipped: dict[str, list[str]]  # ids by reason

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(tokens) for tokens, _ in self.samples]

    @property
    def skips(self) -> dict[str, int]:
        """How many samples were left out, by reason."""
        return {reason: len(ids) for reason, ids in self.skipped.items()}


def encode(path: str | Path, tokenizer: "PreTrainedTokenizerBase", settings: Mapping) -> Encoded:
    """Return a set's samples as tokens: prompt by the template, answer, end of sequence.

    The loss is over the answer's tokens and the end. An answer that was cut before it ended (the
    model's own, at its last allowed token) gets no end.

    Args:
        path: JSONL of id, prompt, answer and, where an answer was cut, ``"ended": false``.
        tokenizer: of the checkpoint.
        settings: config section ``gradients`` with ``template``, ``length``, ``too_long``.

    Raises:
        InputError: for a tokenizer without end of sequence, ids that collide, no sample left, or
            one that is too long where ``too_long`` is ``refuse``.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the checkpoint's tokenizer has no end of sequence (eos_token), which every answer "
            "ends with (allowed: a tokenizer with one)"
        )
    ids, samples, skipped = [], [], {}
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        tokens, answer = _tokens(row, tokenizer, settings["template"])
        reason = _reason(row, tokens, answer, settings)
        if reason == "cut":
            tokens, reason = tokens[: settings["length"]], None
        if reason is not None:
            skipped.setdefault(reason, []).append(row["id"])
            continue
        ids.append(row["id"])
        samples.append((tokens, answer))
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"{path}: id {twice[0]!r} stands twice (allowed: each id once)")
    if len(ids) < 2:
        counts = ", ".join(f"{len(left)} {reason}" for reason, left in skipped.items())
        raise InputError(
            f"{path}: {len(ids)} samples are left ({counts or 'none was there'}; allowed: two or "
            f"more; see gradients.length and gradients.too_long)"
        )
    return Encoded(ids, samples, skipped)


def _reason(row: Mapping, tokens: list[int], answer: int, settings: Mapping) -> str | None:
    """Why a sample is left out or cut; None: it is taken as it is."""
    if not row["answer"]:
        return row.get("skipped", "empty answer")
    if len(tokens) <= settings["length"]:
        return None
    if settings["too_long"] == "refuse":
        raise InputError(
            f"sample {row['id']} has {len(tokens)} tokens, config key gradients.length is "
            f"{settings['length']} (allowed: gradients.too_long skip or cut)"
        )
    if settings["too_long"] == "cut":
        return "cut" if answer < settings["length"] else "too long a prompt"
    return "too long"


def prompt_text(
    prompt: str, tokenizer: "PreTrainedTokenizerBase", template: str | Mapping
) -> tuple[str, bool]:
    """Return the text before an answer, and whether it brings its own special tokens."""
    if template == "auto" and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        form = tokenizer.chat_template
        text = tokenizer.apply_chat_template(
            turn,
            chat_template=DATED + form if "strftime_now" in form else form,
            tokenize=False,
            add_generation_prompt=True,
            date_string=TODAY,
        )
        return text, True
    form = TEMPLATE if template == "auto" else template["prompt"]
    return form.replace("{prompt}", prompt), False


def _tokens(
    row: Mapping, tokenizer: "PreTrainedTokenizerBase", template: str | Mapping
) -> tuple[list[int], int]:
    text, complete = prompt_text(row["prompt"], tokenizer, template)
    prompt = begin(tokenizer, text, complete)
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id] if row.get("ended", True) else []
    return prompt + answer + end, len(prompt)


def begin(tokenizer: "PreTrainedTokenizerBase", text: str, complete: bool) -> list[int]:
    """Return the tokens of the text before an answer, after the beginning of sequence if any."""
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if complete or bos is None or not _begins(tokenizer):
        return found
    return [bos, *found]


def _begins(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer itself puts its beginning of sequence before a text."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
