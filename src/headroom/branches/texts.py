"""Texts that become branches: documents as token numbers, in arrays that are mapped from disk."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headroom.checkpoints import check_manifest, write_json, write_manifest
from headroom.corpora.text import read_texts
from headroom.corpora.tokens import BATCH, encoder
from headroom.errors import InputError
from headroom.progress import progress

LONG_TEXTS = ("first", "pieces", "drop")
SHORTEST = 2  # tokens: fewer have nothing to predict
SEED = 0  # of the order in which texts are taken


class Texts(NamedTuple):
    """Texts as token numbers, one after another; text i is tokens[starts[i]:starts[i + 1]].

    Shapes: tokens uint16, or uint32 where a number needs it, (N,); starts int64 (M + 1,); documents
    int64 (M,), the row of the document in its split.
    """

    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, <s> and </s> included: int64 (M,)."""
        return np.diff(self.starts)


def write_texts(
    settings: Mapping[str, Any],
    split: str,
    documents: str | Path,
    others: str | Path | None,
    tokenizer: str | Path,
    output: str | Path,
) -> dict[str, int]:
    """Write the texts of a split as arrays, with ``counts.json`` and a manifest.

    A document is <s> … </s>. Of a longer one than ``length``, ``first`` keeps the first tokens and
    ``pieces`` makes a text of every ``length`` tokens; a cut end has no </s> and what follows a cut
    no <s>, because the document neither ends nor begins there. ``drop`` leaves it out. The texts
    are taken in a seeded order that is the same however many are wanted.

    Args:
        settings: ``length``, ``long_texts`` and ``texts`` of the configuration's ``branches``.
        split: ``train`` or ``evaluation``; ``texts`` has its number of texts, all if None.
        documents: Parquet file of the split's documents.
        others: Parquet file of documents whose texts are left out (equal tokens, by SHA-256).
        tokenizer: folder of a tokenizer that has <s> and </s>.
        output: folder for the arrays.

    Returns:
        documents: all that were read; cut, dropped_long: those longer than ``length``;
        dropped_short: pieces of fewer than two tokens; dropped_duplicates: texts that are among
        the others or stand in the split already; texts, tokens: what is stored.

    Raises:
        InputError: for a tokenizer without <s> or </s>, or fewer texts than are wanted.
    """
    found, counts = _cut(read_texts(documents), settings, tokenizer)
    seen = set(_digests(_cut(read_texts(others), settings, tokenizer)[0])) if others else set()
    # Twins go too: side by side one would read its tokens in the other.
    first = {digest: place for place, digest in reversed([*enumerate(_digests(found))])}
    kept = np.sort([place for digest, place in first.items() if digest not in seen]).astype(int)
    chosen = kept[_order(len(kept), settings["texts"].get(split), split)]
    counts["dropped_duplicates"] = len(found.documents) - len(kept)
    counts |= _save(found, chosen, Path(output))
    print(
        f"{split}: {counts['texts']} texts of {counts['documents']} documents; of those longer "
        f"than {settings['length']} tokens {counts['cut']} were cut ({settings['long_texts']}), "
        f"{counts['dropped_long']} dropped; {counts['dropped_duplicates']} duplicates dropped",
        file=sys.stderr,
    )
    write_json(Path(output) / "counts.json", counts)
    write_manifest(Path(output))
    return counts


def load_texts(folder: str | Path) -> Texts:
    """Map the arrays of a split into memory; nothing is read before it is used.

    Raises:
        InputError: if a file is missing or damaged.
    """
    check_manifest(folder)
    paths = [Path(folder) / f"{name}.npy" for name in Texts._fields]
    # Plain views: a memmap makes an object of its own of each small slice.
    return Texts(*(np.asarray(np.load(path, mmap_mode="r")) for path in paths))


def _cut(
    documents: list[str], settings: Mapping[str, Any], tokenizer: str | Path
) -> tuple[Texts, dict[str, int]]:
    """Encode documents and cut them into texts; the tokens are uint32."""
    encode, specials = encoder(Path(tokenizer))
    if None in specials.values():
        raise InputError(f"tokenizer {tokenizer} lacks a token (allowed: one with <s> and </s>)")
    counts = {"documents": len(documents), "cut": 0, "dropped_long": 0, "dropped_short": 0}
    blocks, lengths, origins = [np.zeros(0, dtype=np.uint32)], [], []
    for start in progress(range(0, len(documents), BATCH), "tokenising", unit="batch"):
        texts: list[list[int]] = []
        for row, ids in enumerate(encode(documents[start : start + BATCH]), start):
            whole = [specials["bos"], *ids, specials["eos"]]
            pieces = _pieces(whole, settings["length"], settings["long_texts"])
            counts["dropped_long"] += not pieces
            counts["cut"] += bool(pieces) and len(whole) > settings["length"]
            long_enough = [piece for piece in pieces if len(piece) >= SHORTEST]
            counts["dropped_short"] += len(pieces) - len(long_enough)
            texts += long_enough
            origins += [row] * len(long_enough)
        lengths += map(len, texts)
        blocks.append(np.array([token for text in texts for token in text], dtype=np.uint32))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Texts(np.concatenate(blocks), starts, np.array(origins, dtype=np.int64)), counts


def _pieces(whole: list[int], length: int, long_texts: str) -> list[list[int]]:
    if len(whole) <= length:
        return [whole]
    if long_texts == "drop":
        return []
    last = length if long_texts == "first" else len(whole)
    return [whole[start : start + length] for start in range(0, last, length)]


def _order(texts: int, wanted: int | None, split: str) -> np.ndarray:
    """Return the wanted number of texts, or all, in the seeded order."""
    if not texts:
        raise InputError(
            f"config key branches.corpus: no text of its {split} split is left (allowed: a corpus "
            f"with other texts there, or other branches.length and branches.long_texts)"
        )
    if wanted is not None and wanted > texts:
        raise InputError(
            f"config key branches.texts.{split} is {wanted}, but there are {texts} texts "
            f"(allowed: at most {texts})"
        )
    return np.random.default_rng(SEED).permutation(texts)[:wanted]


def _slices(texts: Texts, chosen: np.ndarray) -> list[np.ndarray]:
    bounds = zip(texts.starts[chosen].tolist(), texts.starts[chosen + 1].tolist(), strict=True)
    return [texts.tokens[start:stop] for start, stop in bounds]


def _digests(texts: Texts) -> list[bytes]:
    slices = _slices(texts, np.arange(len(texts.documents)))
    return [hashlib.sha256(tokens.tobytes()).digest() for tokens in slices]


def _save(texts: Texts, chosen: np.ndarray, folder: Path) -> dict[str, int]:
    tokens = np.concatenate(_slices(texts, chosen))
    narrow = np.uint16 if tokens.max() <= np.iinfo(np.uint16).max else np.uint32
    starts = np.concatenate([[0], np.cumsum(texts.lengths[chosen])])
    folder.mkdir(parents=True, exist_ok=True)
    stored = Texts(tokens.astype(narrow), starts, texts.documents[chosen])
    for name, array in stored._asdict().items():
        np.save(folder / f"{name}.npy", array)
    return {"texts": len(chosen), "tokens": len(tokens)}
