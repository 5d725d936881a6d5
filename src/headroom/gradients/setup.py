"""What a partition is measured with: samples in their grids, the model, the plan, the identity."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from headroom.checkpoints import digest_folder, load_model, load_tokenizer
from headroom.errors import InputError
from headroom.gradients.capture import Capture
from headroom.gradients.choose import Work, choose
from headroom.gradients.encoding import Encoded, encode
from headroom.gradients.grid import Grid, make_grid, partition
from headroom.gradients.planner import Plan, Sizes, feature_elements, make_plan, pair_flops
from headroom.gradients.similarity import Measurer
from headroom.gradients.store import groups

LOSS = "mean cross-entropy of answer tokens and end of sequence"


class Side(NamedTuple):
    """A set of samples in its grid."""

    encoded: Encoded
    grid: Grid
    digest: str

    def batch(self, rows: Sequence[int]) -> list[tuple[list[int], int]]:
        """Samples at places of the grid."""
        return [self.encoded.samples[self.grid.order[row]] for row in rows]


@dataclass
class Setup:
    """Everything that a partition is measured with."""

    originals: Side
    queries: Side
    measurer: Measurer
    blocks: range  # of originals
    plan: Plan
    identity: dict
    features: Path  # folder of stored features

    @property
    def rows(self) -> range:
        """Places of the partition's originals in the grid."""
        grid = self.originals.grid
        if not self.blocks:
            return range(0)
        return range(grid.block_rows(self.blocks[0]).start, grid.block_rows(self.blocks[-1]).stop)


def prepare(
    checkpoint: str,
    sets: Mapping[str, str],
    settings: Mapping,
    part: tuple[int, int],
    halvings: int,
    features: Path,
) -> Setup:
    """Return what a partition is measured with: samples, model, plan; see :func:`measure_part`."""
    own, compute = settings["gradients"], settings["compute"]
    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer = load_tokenizer(checkpoint)
    originals, queries = (
        side_of(encode(sets[name], tokenizer, own), own) for name in ("originals", "queries")
    )
    model = load_model(checkpoint, compute["device"], compute["dtype"])
    capture = Capture(model)
    choice = choice_of(settings["backend"], capture, originals, own)
    _check_positions(model.config, own["length"], originals, queries)
    measurer = Measurer(capture, choice, own, max(1, own["batch"] >> halvings))
    blocks = partition(originals.grid.blocks, *part)
    identity = {
        "checkpoint": digest_folder(checkpoint),
        "backend": settings["backend"],
        "choice": choice,
        "loss": LOSS,
        "dtype": str(model.dtype),
        "batch": own["batch"],
        **{name: own[name] for name in ("projection", "two_sided") if name == settings["backend"]},
    }
    plan = plan_part(originals, queries, measurer, blocks, own)
    own_folder = features / hashlib.sha256(_text(identity).encode()).hexdigest()[:24]
    return Setup(originals, queries, measurer, blocks, plan, identity, own_folder)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _check_positions(config, limit: int, *sides: Side) -> None:
    """Refuse samples longer than the model has positions: GPT-2 would read beyond its table."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(max(side.encoded.lengths) for side in sides)
    if positions is not None and longest > positions:
        raise InputError(
            f"config key gradients.length is {limit}: a sample has {longest} tokens, the model "
            f"takes {positions} (allowed: at most {positions})"
        )


def choice_of(backend: str, capture: Capture, originals: Side, own: Mapping) -> dict[str, str]:
    """Return each layer's backend, by the originals alone: settings share their features."""
    lengths = originals.encoded.lengths
    work = Work(len(lengths), len(lengths), sum(lengths) / len(lengths))
    looked_up = [name for name, tied in capture.embeddings.items() if not tied]
    return choose(backend, capture.shapes, looked_up, work, own.get("ghost_speed", 1.0))


def side_of(encoded: Encoded, own: Mapping) -> Side:
    """Return a set in its grid, with a digest of what the model reads of it."""
    digest = hashlib.sha256(_text([encoded.ids, encoded.samples]).encode()).hexdigest()[:24]
    return Side(encoded, make_grid(encoded.lengths, own["batch"], own["block"]), digest)


def plan_part(
    originals: Side, queries: Side, measurer: Measurer, blocks: range, own: Mapping
) -> Plan:
    """Return how a partition's blocks are measured."""
    shapes, model = measurer.capture.shapes, measurer.capture.model
    lengths = [originals.encoded.lengths, queries.encoded.lengths]
    longest = max(map(max, lengths))
    embeddings = measurer.capture.embeddings
    elements = feature_elements(measurer.choice, shapes, embeddings, longest, own)
    mean = sum(map(sum, lengths)) / sum(map(len, lengths))
    sizes = Sizes(
        feature_bytes={name: 4 * count for name, count in elements.items()},
        group_bytes=4 * max(sum(elements[n] for n in names) for names in groups(shapes).values()),
        pair_flops=pair_flops(measurer.choice, elements, mean),
        parameters={name: int(np.prod(shape)) for name, shape in shapes.items()},
        originals=len(lengths[0]),
        queries=len(lengths[1]),
        part=sum(len(originals.grid.block_rows(number)) for number in blocks),
        tokens=sum(map(sum, lengths)),
        longest=longest,
        activations=4 * sum(sum(shape) for shape in shapes.values()),
        element=model.dtype.itemsize,
        batch=measurer.size,
        block=own["block"],
    )
    return make_plan(sizes, own["memory_gb"], own["disk_gb"])
