"""Tokens: train a byte-level BPE, turn documents into one flat stream, cut it into windows.

Neither torch nor transformers is imported where a folder's ``tokenizer.json`` suffices.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headroom.errors import InputError
from headroom.progress import progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
ALPHABET = 256  # bytes, each a token of its own, so that no text is out of vocabulary
BATCH = 1024  # documents encoded at once


@dataclass(frozen=True)
class Stream:
    """Documents one after another, each begun by the boundary token where there is one."""

    tokens: np.ndarray  # int32 (N,)
    documents: np.ndarray  # int32 (N,), the index of the document that a token belongs to
    boundary: str  # bos, eos or none
    boundary_token: int | None


def train_tokenizer(texts: Iterable[str], vocabulary: int, output: str | Path) -> None:
    """Train a byte-level BPE with <s>, </s>, <pad> and write it where AutoTokenizer loads it.

    Args:
        texts: training texts.
        vocabulary: number of tokens, specials and the 256 bytes included.
        output: folder for tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises:
        InputError: for a vocabulary that is too small, or larger than the texts can fill.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = ALPHABET + len(SPECIALS)
    if vocabulary < least:
        raise InputError(f"vocabulary {vocabulary} is too small (allowed: at least {least})")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise InputError(
            f"vocabulary {vocabulary}: the training text fills {tokenizer.get_vocab_size()} tokens "
            f"only (give more text or a smaller vocabulary)"
        )
    _save_tokenizer(tokenizer, Path(output))


def _save_tokenizer(tokenizer: "Tokenizer", output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # what transformers writes for "no limit"
        **SPECIALS,
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", SPECIALS)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def token_stream(
    texts: Iterable[str],
    tokenizer: str | os.PathLike,
    boundary: str = "auto",
    key: str = "corpora",
) -> Stream:
    """Encode documents into one stream with the boundary token before each of them.

    The tokenizer adds nothing by itself.

    Args:
        tokenizer: folder of a tokenizer or checkpoint.
        boundary: ``bos``, ``eos`` or ``none``; ``auto`` is bos, or eos where there is no bos.
        key: of the corpus in the configuration, for messages.

    Raises:
        InputError: for a boundary that the tokenizer lacks, or without any text.
    """
    encode, specials = encoder(Path(tokenizer))
    boundary, token = boundary_token(specials, boundary, key)
    prefix = [] if token is None else [token]
    pieces: list[np.ndarray] = []
    batch: list[str] = []
    for text in progress(texts, "tokenising", unit="text"):
        batch.append(text)
        if len(batch) == BATCH:
            pieces += [np.array(prefix + ids, dtype=np.int32) for ids in encode(batch)]
            batch = []
    pieces += [np.array(prefix + ids, dtype=np.int32) for ids in encode(batch)] if batch else []
    if not sum(map(len, pieces)):
        raise InputError(f"config key {key}: there is no text to encode")
    documents = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
    return Stream(np.concatenate(pieces), documents, boundary, token)


def boundary_token(specials: dict, boundary: str, key: str) -> tuple[str, int | None]:
    """Resolve ``auto`` and return the boundary's name and token number.

    Args:
        specials: token numbers of ``bos`` and ``eos``; None where the tokenizer has none.

    Raises:
        InputError: if the tokenizer lacks it.
    """
    if boundary == "auto":
        boundary = "bos" if specials["bos"] is not None else "eos"
    if boundary == "none":
        return boundary, None
    if specials.get(boundary) is None:
        having = [name for name, number in specials.items() if number is not None]
        raise InputError(
            f"config key {key}.boundary: the tokenizer has no {boundary} token "
            f"(allowed: {', '.join([*having, 'none'])})"
        )
    return boundary, specials[boundary]


def encoder(folder: Path):
    """Return a function from texts to lists of token numbers, and the special tokens' numbers.

    The function adds no special tokens; the numbers are those of ``bos`` and ``eos``, None where
    the tokenizer has none.
    """
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True  # "<s>" inside a text is text, no boundary
        config = json.loads((folder / "tokenizer_config.json").read_text())
        mapping = folder / "special_tokens_map.json"
        named = (json.loads(mapping.read_text()) if mapping.is_file() else {}) | config
        specials = {name: _number(fast, named.get(f"{name}_token")) for name in ("bos", "eos")}

        def encode(texts: list[str]) -> list[list[int]]:
            return [e.ids for e in fast.encode_batch(texts, add_special_tokens=False)]

        return encode, specials
    from headroom.checkpoints import load_tokenizer

    slow = load_tokenizer(folder)
    specials = {"bos": slow.bos_token_id, "eos": slow.eos_token_id}
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return lambda texts: slow(texts, **options)["input_ids"], specials


def _number(tokenizer: "Tokenizer", token: str | dict | None) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return None if content is None else tokenizer.token_to_id(content)


def save_stream(stream: Stream, path: str | Path) -> None:
    """Write a stream as safetensors with the boundary in its metadata."""
    from safetensors.numpy import save_file

    arrays = {name: getattr(stream, name) for name in ("tokens", "documents")}
    notes = {name: getattr(stream, name) for name in ("boundary", "boundary_token")}
    # One key: safetensors writes several in an order that differs from process to process.
    save_file(arrays, path, metadata={"notes": json.dumps(notes, sort_keys=True)})


def load_stream(path: str | Path) -> Stream:
    """Read what :func:`save_stream` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        notes = json.loads(file.metadata()["notes"])
        return Stream(file.get_tensor("tokens"), file.get_tensor("documents"), **notes)


def windows(stream: Stream, length: int, key: str = "window") -> tuple[np.ndarray, np.ndarray]:
    """Cut a stream into windows that don't overlap; what remains at the end is left out.

    Args:
        length: T, tokens of a window.
        key: the configuration key of the length, for messages.

    Returns:
        tokens and document indices, int64 (N, T).

    Raises:
        InputError: if the stream is shorter than one window or the window than two tokens.
    """
    count = len(stream.tokens) // length if length > 1 else 0
    if count == 0:
        raise InputError(
            f"config key {key} is {length}: the text has {len(stream.tokens)} tokens "
            f"(allowed: 2 to {len(stream.tokens)})"
        )
    cut = slice(0, count * length)
    return (
        stream.tokens[cut].reshape(count, length).astype(np.int64),
        stream.documents[cut].reshape(count, length).astype(np.int64),
    )
