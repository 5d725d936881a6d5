"""Paraphrases of a causal language model on this machine, by its chat template where it has one."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headroom.checkpoints import load_model, load_tokenizer
from headroom.corpora.generation import continuations, end_tokens
from headroom.corpora.paraphrase_endpoint import SYSTEM
from headroom.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = "Rewrite the text in other words.\n\nText: {text}\n\nParaphrase:"
STOPS = ("\n\n", "\nText:", "\nParaphrase:")  # a model without turns goes on after its paraphrase
NEW_TOKENS, BATCH, TEMPERATURE = 512, 8, 0.7  # where the configuration says nothing


def paraphraser(settings: Mapping, key: str) -> "Model":
    """Return a paraphraser that runs a local model (interface in corpora.paraphrase).

    Args:
        settings: path, or hub and revision; temperature (0: greedy), seed, new_tokens a paraphrase
            has at most, batch, device, dtype, threads.
        key: the configuration key that messages name.

    Raises:
        InputError: for a model that can't be loaded.
    """
    return Model(settings, key)


class Model:
    """A causal model that rewrites texts in batches.

    Noise is drawn from a generator of each text, so that up to rounding a paraphrase depends on
    model, seed, attempt and text alone, not on its neighbours in a batch.
    """

    def __init__(self, settings: Mapping, key: str):
        """Load model and tokenizer.

        Raises:
            InputError: if they can't be loaded, or the tokenizer has neither padding nor end.
        """
        import torch

        torch.set_num_threads(settings.get("threads", 1))
        folder = _folder(settings, key)
        try:
            self.tokenizer = load_tokenizer(folder)
            self.model = load_model(
                folder, settings.get("device", "cpu"), settings.get("dtype", "float32")
            )
        except (OSError, ValueError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InputError(f"config key {key}: {folder} can't be loaded: {first}") from error
        self.settings, self.key = settings, key
        self.ends = end_tokens(self.model, self.tokenizer)
        if not self.ends:
            raise InputError(
                f"config key {key}: neither model nor tokenizer in {folder} names an end token "
                f"(allowed: eos_token_id in generation_config.json or config.json)"
            )

    def __call__(self, texts: Sequence[str], attempt: int) -> Iterator[tuple[int, str]]:
        """Yield (place, paraphrase), batches of like length, the longest first."""
        prompts = [self._prompt(text) for text in texts]
        new = self.settings.get("new_tokens", NEW_TOKENS)
        room = getattr(self.model.config, "max_position_embeddings", sys.maxsize) - new
        if room < 1:
            raise InputError(
                f"config key {self.key}.new_tokens is {new} (allowed: fewer than the model's "
                f"{room + new} positions)"
            )
        too_long = [place for place, prompt in enumerate(prompts) if len(prompt) > room]
        if too_long:
            print(
                f"{self.key}: {len(too_long)} texts don't fit the model's positions with "
                f"{new} new tokens: no paraphrase",
                file=sys.stderr,
            )
        yield from ((place, "") for place in too_long)
        fitting = sorted(set(range(len(texts))) - set(too_long), key=lambda i: -len(prompts[i]))
        size = self.settings.get("batch", BATCH)
        for start in range(0, len(fitting), size):
            places = fitting[start : start + size]
            seeds = [self._seed(texts[place], attempt) for place in places]
            found = self._generated([prompts[place] for place in places], seeds, new)
            yield from zip(places, found, strict=True)

    def _prompt(self, text: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(PLAIN.format(text=text))["input_ids"]
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        options = {"add_generation_prompt": True, "tokenize": False}
        try:
            chat = self.tokenizer.apply_chat_template(turns, **options)
        except Exception as error:  # a template says by any error of its own that it has no system
            if type(error).__name__ not in ("TemplateError", "UndefinedError"):
                raise
            turns = [{"role": "user", "content": f"{SYSTEM}\n\n{text}"}]
            chat = self.tokenizer.apply_chat_template(turns, **options)
        return self.tokenizer(chat, add_special_tokens=False)["input_ids"]

    def _seed(self, text: str, attempt: int) -> int:
        parts = f"{self.settings.get('seed', 0)}\0{attempt}\0{text}"
        digest = hashlib.sha256(parts.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:7], "big")

    def _generated(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], new: int
    ) -> list[str]:
        temperature = self.settings.get("temperature", TEMPERATURE)
        noise = [_Noise(seeds, temperature)] if temperature else []
        made = continuations(self.model, prompts, new, self.ends, noise)
        return [self._read(tokens) for tokens in made]

    def _read(self, tokens: list[int]) -> str:
        """Return the paraphrase; "" of one that was cut, which no gate lets through."""
        places = [place for place, token in enumerate(tokens) if token in self.ends]
        ended = bool(places)
        text = self.tokenizer.decode(tokens[: places[0]] if ended else tokens, True).strip()
        if not self.tokenizer.chat_template:
            stops = [text.index(stop) for stop in STOPS if stop in text]
            text, ended = text[: min(stops)] if stops else text, ended or bool(stops)
        return text.strip() if ended else ""


class _Noise:
    """Samples by the Gumbel trick: argmax(logits / temperature + noise) is a draw of softmax."""

    def __init__(self, seeds: Sequence[int], temperature: float):
        import torch

        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        import torch

        size = scores.shape[-1]
        uniform_BV = torch.stack([torch.rand(size, generator=g) for g in self.generators])
        noise_BV = -torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + noise_BV.to(scores.device)


def _folder(settings: Mapping, key: str) -> Path:
    from headroom.imports import check_folder, fetch

    if "path" in settings:
        folder = Path(settings["path"]).expanduser().resolve()
    else:
        folder = fetch(settings, f"{key}.hub", ("*.safetensors",))
    check_folder(folder, None, key)
    return folder
