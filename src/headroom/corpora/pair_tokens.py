"""Tokens of sentence pairs: a joint BPE, ragged token numbers, and batches of like lengths."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from headroom.errors import InputError
from headroom.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # numbers 0, 1, 2
IGNORED = -100  # label that the loss leaves out
CHUNK = 4096  # sentences encoded at once


class PairTokens(NamedTuple):
    """Sentence pairs as token numbers, one after another; sentence i is ids[starts[i]:starts[i+1]].

    Shapes: ids int32 (tokens,), starts int64 (pairs + 1,).
    """

    source_ids: "Tensor"
    source_starts: "Tensor"
    target_ids: "Tensor"
    target_starts: "Tensor"
    too_long: int  # pairs that were left out

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.source_starts) - 1

    @property
    def lengths(self) -> tuple["Tensor", "Tensor"]:
        """Tokens of each source and of each target, </s> included: int64 (pairs,) each."""
        return self.source_starts.diff(), self.target_starts.diff()

    def source(self, index: int) -> "Tensor":
        """Token numbers of a source sentence."""
        return self.source_ids[self.source_starts[index] : self.source_starts[index + 1]]

    def target(self, index: int) -> "Tensor":
        """Token numbers of a target sentence."""
        return self.target_ids[self.target_starts[index] : self.target_starts[index + 1]]


def train_joint_tokenizer(texts: Iterable[str], vocabulary: int, output: str | Path) -> None:
    """Train one BPE for both languages and write it where AutoTokenizer loads it.

    Spaces are kept as U+2581, each digit and each punctuation mark stands alone, and </s> ends what
    is encoded. Decoding gives the text back if its characters were seen and its white space is that
    of :func:`headroom.corpora.forms.plain`.

    Args:
        texts: training sentences of both languages.
        vocabulary: number of tokens, <pad>, </s> and <unk> included.
        output: folder for tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises:
        InputError: for a vocabulary smaller than the characters, or larger than the texts can fill.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIALS.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise InputError(
            f"vocabulary {vocabulary} is too {_misfit(tokenizer.get_vocab_size(), vocabulary)}"
        )
    end = SPECIALS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}",
        pair=f"$A {end} $B {end}",
        special_tokens=[(end, tokenizer.token_to_id(end))],
    )
    _save_tokenizer(tokenizer, Path(output))


def _misfit(found: int, wanted: int) -> str:
    if found > wanted:
        return f"small: characters and specials alone are {found} (allowed: at least {found})"
    return f"large: the training text fills {found} tokens only (allowed: at most {found})"


def _save_tokenizer(tokenizer, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # Marian takes no token types
        "model_max_length": 10**30,  # what transformers writes for "no limit"
        **SPECIALS,
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", SPECIALS)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def encode_pairs(
    sources: Sequence[str],
    targets: Sequence[str],
    tokenizer,
    longest: int,
    key: str = "pairs.max_tokens",
) -> PairTokens:
    """Encode sentence pairs and leave out those too long on a side.

    Args:
        sources: sentences of the source language.
        targets: their translations.
        tokenizer: of transformers; it may encode targets in another way (``text_target``).
        longest: most tokens of a side, </s> included.
        key: the configuration key of ``longest``, for messages.

    Raises:
        InputError: if no pair is short enough.
    """
    import torch

    kept: list[tuple[list[int], list[int]]] = []
    for start in progress(range(0, len(sources), CHUNK), "tokenising", unit="chunk"):
        part = slice(start, start + CHUNK)
        # "</s>" inside a sentence is text; what is too long is left out, so no warning about it.
        options = {"split_special_tokens": True, "verbose": False}
        first = tokenizer(list(sources[part]), **options)["input_ids"]
        second = tokenizer(text_target=list(targets[part]), **options)["input_ids"]
        kept += [pair for pair in zip(first, second, strict=True) if max(map(len, pair)) <= longest]
    if not kept:
        raise InputError(
            f"config key {key} is {longest}: none of {len(sources)} pairs has so few tokens "
            f"(allowed: a larger number)"
        )
    sides: list[Tensor] = []
    for side in zip(*kept, strict=True):
        lengths = torch.tensor([0, *map(len, side)], dtype=torch.int64)
        ids = [number for sentence in side for number in sentence]
        sides += [torch.tensor(ids, dtype=torch.int32), lengths.cumsum(0)]
    return PairTokens(*sides, too_long=len(sources) - len(kept))


def save(pair_tokens: PairTokens, path: str | Path) -> None:
    """Write pairs as safetensors with the number of those left out in the metadata."""
    from safetensors.torch import save_file

    tensors = pair_tokens._asdict()
    save_file(tensors, path, metadata={"too_long": str(tensors.pop("too_long"))})


def load(path: str | Path) -> PairTokens:
    """Read what :func:`save` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in PairTokens._fields[:-1]}
        return PairTokens(**tensors, too_long=int(file.metadata()["too_long"]))


class Batches:
    """Batches of pairs of like lengths: step -> indices, a pure function of seed and step.

    In each epoch each pair comes once. Pairs are sorted by (source, target) length with random ties
    and cut greedily, so that a padded batch keeps n·max(longest source, longest target) ≤
    ``batch_tokens``; a pair longer than that is a batch of its own. Then the batches are shuffled.
    The lengths in sorted order are those of any epoch, so the cuts and the number of batches are.
    """

    def __init__(self, pairs: PairTokens, batch_tokens: int, seed: int):
        """Cut the sorted lengths into batches; the pairs in them are drawn epoch by epoch."""
        self.seed = seed
        self.sources, self.targets = (lengths.numpy() for lengths in pairs.lengths)
        order = np.lexsort((self.targets, self.sources))
        longer = np.maximum(self.sources, self.targets)[order]
        self.cuts = _cuts(longer.tolist(), batch_tokens)
        self.steps_per_epoch = len(self.cuts) + 1
        self.current = -1
        self.batches: list[list[int]] = []

    def __call__(self, step: int) -> list[int]:
        """Return the pairs in the batch of a step; steps count from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.current:
            self.batches, self.current = self._drawn(epoch), epoch
        return self.batches[place]

    def epoch(self, step: int) -> float:
        """Return the epochs completed after so many steps."""
        return step / self.steps_per_epoch

    def _drawn(self, epoch: int) -> list[list[int]]:
        draw = np.random.default_rng([self.seed, epoch])
        ties = draw.permutation(len(self.sources))
        order = np.lexsort((ties, self.targets, self.sources))
        batches = [batch.tolist() for batch in np.split(order, self.cuts)]
        return [batches[place] for place in draw.permutation(len(batches))]


def _cuts(longer: list[int], batch_tokens: int) -> list[int]:
    """Return where batches begin, but the first, given the longer side of each sorted pair."""
    cuts, start, longest = [], 0, 0
    for place, length in enumerate(longer):
        longest = max(longest, length)
        if place > start and (place + 1 - start) * longest > batch_tokens:
            cuts.append(place)
            start, longest = place, length
    return cuts


def collate(pairs: PairTokens, indices: Sequence[int], pad: int, device) -> dict[str, "Tensor"]:
    """Pad pairs on the right to what the model takes.

    Args:
        pairs: all pairs.
        indices: of those in the batch.
        pad: the tokenizer's padding token.
        device: where the model is.

    Returns:
        input_ids and attention_mask (B, longest source), labels (B, longest target) with -100 for
        padding; int64.
    """
    from torch.nn.utils.rnn import pad_sequence

    sources, targets = (
        [side(index).long() for index in indices] for side in (pairs.source, pairs.target)
    )
    batch = {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([s.new_ones(len(s)) for s in sources], batch_first=True),
        "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
