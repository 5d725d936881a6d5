"""Speed of laying texts side by side: beside a loop over samples, texts and tokens, and a sort.

    python benchmarks/branch_layout.py

Prints a Markdown table. All versions take turns in one run, on the same texts, and must agree in
every number; fastest of the rounds (three for the slow loop), one thread. ``loop``: Python lists,
sorted, as a collator is first written. ``lexsort``: vectorised, tokens sorted by (sample, time,
branch) with numpy.lexsort. ``columns``: the counting sort that the study uses. Texts have 0.5 to
1.5 times the given tokens and begin at times up to their length.

Floor: six int64 arrays and a bool are written, 49 bytes a position, and a token of 2 bytes is read
twice; at 10 GB/s that is 5 ns a token. The table of the counting sort has about three bytes a token
(written, marked, scanned).
"""

import argparse
import sys
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

from headroom.branches.layout import IGNORED, Batch, columns
from headroom.branches.texts import Texts

SHAPES = (
    (64, 8, 250),
    (8, 1, 250),
    (2, 4, 250),
    (2, 32, 250),
    (4, 4, 32),
)  # samples, texts, tokens
PADS = Batch(0, IGNORED, 0, 0, 0, False, -1)


def random_texts(length: int, count: int = 5000) -> Texts:
    """Random tokens of a 6400-word vocabulary."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(length // 2, length * 3 // 2 + 1, count)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = draw.integers(0, 6400, starts[-1]).astype(np.uint16)
    return Texts(tokens, starts, np.arange(count))


def draw_samples(texts: Texts, samples: int, branches: int) -> tuple[list, list]:
    """Random texts and offsets."""
    draw = np.random.default_rng(1)
    chosen = draw.integers(len(texts.documents), size=(samples, branches))
    return chosen.tolist(), draw.integers(texts.lengths[chosen] + 1).tolist()


def loop(texts: Texts, samples: list, offsets: list) -> Batch:
    """Collect the tokens one by one, sort each sample, pad."""
    rows = []
    for sample, begun in zip(samples, offsets, strict=True):
        row = []
        for branch, (text, offset) in enumerate(zip(sample, begun, strict=True)):
            ids = texts.tokens[texts.starts[text] : texts.starts[text + 1]].tolist()
            for place, token in enumerate(ids):
                label = ids[place + 1] if place + 1 < len(ids) else IGNORED
                row.append((offset + place, branch, token, label, text))
        row.sort()
        rows.append(row)
    longest = max(map(len, rows))
    made = [[], [], [], [], [], [], []]
    for row in rows:
        pads = longest - len(row)
        time_S, branch_S, tokens_S, labels_S, text_S = map(list, zip(*row, strict=True))
        made[0].append(tokens_S + [0] * pads)
        made[1].append(labels_S + [IGNORED] * pads)
        made[2].append(list(range(longest)))
        made[3].append(time_S + [0] * pads)
        made[4].append(branch_S + [0] * pads)
        made[5].append([True] * len(row) + [False] * pads)
        made[6].append(text_S + [-1] * pads)
    return Batch(*map(np.array, made))


def lexsort(texts: Texts, samples: list, offsets: list) -> Batch:
    """Tokens in the order of texts, then one general sort of all of them."""
    counts_B = np.array([len(sample) for sample in samples])
    text_M = np.fromiter(chain.from_iterable(samples), np.int64)
    offset_M = np.fromiter(chain.from_iterable(offsets), np.int64)
    length_M = texts.lengths[text_M]
    sample_M = np.repeat(np.arange(len(samples)), counts_B)
    branch_M = np.arange(len(text_M)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    place_T = np.arange(length_M.sum()) - np.repeat(np.cumsum(length_M) - length_M, length_M)
    source_T = np.repeat(texts.starts[text_M], length_M) + place_T
    time_T = np.repeat(offset_M, length_M) + place_T
    branch_T, sample_T = np.repeat(branch_M, length_M), np.repeat(sample_M, length_M)
    tokens_T = texts.tokens[source_T].astype(np.int64)
    labels_T = np.append(tokens_T[1:], IGNORED)
    labels_T[np.cumsum(length_M) - 1] = IGNORED
    order_T = np.lexsort((branch_T, time_T, sample_T))
    size_B = np.bincount(sample_T, minlength=len(samples))
    place_S = np.arange(size_B.max())
    valid_BS = place_S < size_B[:, None]
    values = Batch(tokens_T, labels_T, None, time_T, branch_T, None, np.repeat(text_M, length_M))
    made = {"flat_BS": np.tile(place_S, (len(samples), 1)), "valid_BS": valid_BS}
    for name in ("tokens_BS", "labels_BS", "time_BS", "branch_BS", "text_BS"):
        made[name] = np.full(valid_BS.shape, getattr(PADS, name), dtype=np.int64)
        made[name][valid_BS] = getattr(values, name)[order_T]
    return Batch(**made)


def fastest(rounds: int, arguments: tuple) -> dict[str, float]:
    """Seconds of each version, in turns; the loop takes part in a few rounds only."""
    seconds: dict[str, list[float]] = {"loop": [], "lexsort": [], "columns": []}
    for turn in range(rounds):
        for version in (loop, lexsort, columns):
            if version is loop and turn >= 3:
                continue
            started = time.perf_counter()
            version(*arguments)
            seconds[version.__name__].append(time.perf_counter() - started)
    return {name: min(found) for name, found in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    settings = parser.parse_args()
    print("| samples x texts x tokens | version | µs a batch | M tokens/s | loop's time / this |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        texts = random_texts(shape[2])
        arguments = (texts, *draw_samples(texts, *shape[:2]))
        expected = loop(*arguments)
        for version in (lexsort, columns):
            for name, found in version(*arguments)._asdict().items():
                np.testing.assert_array_equal(found, getattr(expected, name), err_msg=name)
        tokens = int(expected.valid_BS.sum())
        found = fastest(settings.rounds, arguments)
        for name, seconds in found.items():
            speed, ratio = tokens / seconds / 1e6, found["loop"] / seconds
            row = f"{seconds * 1e6:.0f} | {speed:.1f} | {ratio:.0f}"
            print(f"| {' x '.join(map(str, shape))} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
