"""A partition: some originals, all queries, dot products by layer; from files to a file."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from headroom.gradients.capture import pad
from headroom.gradients.features import Features, concatenated
from headroom.gradients.grid import Grid
from headroom.gradients.result import Result
from headroom.gradients.setup import Setup, prepare
from headroom.gradients.similarity import Block
from headroom.gradients.store import Store
from headroom.progress import progress


def measure_part(
    checkpoint: str,
    sets: Mapping[str, str],
    settings: Mapping,
    part: tuple[int, int],
    halvings: int,
    features: Path,
    outputs: Mapping[str, str],
) -> None:
    """Measure a partition and write its dot products of gradients and of hidden states.

    Args:
        checkpoint: folder of the model.
        sets: files of the ``originals`` and the ``queries``.
        settings: sections ``compute`` and ``gradients``, and ``backend``.
        part: number of the partition and how many there are.
        halvings: how often the batch that goes through the model at once is halved.
        features: folder that all jobs of the same code share for stored features.
        outputs: files ``dots`` and ``states``.

    Raises:
        InputError: for samples, models or sizes that can't be measured.
    """
    setup = prepare(checkpoint, sets, settings, part, halvings, features)
    print(setup.plan.said(), file=sys.stderr, flush=True)
    if setup.blocks:
        some = setup.originals.batch(setup.originals.grid.batches(setup.rows)[0])[:4]
        setup.measurer.capture.check(pad(some, str(setup.measurer.device)))
    result = measure(setup)
    print(f"{setup.measurer.passes:,} backward passes made here", file=sys.stderr, flush=True)
    result.write(outputs)


def measure(setup: Setup) -> Result:
    """Return the dot products of a partition's originals with all queries."""
    result = Result(setup)
    if setup.blocks:
        (_from_store if setup.plan.stored else _in_tiles)(setup, result)
    return result


def _in_tiles(setup: Setup, result: Result) -> None:
    """Hold a tile of originals, send all queries past it; for each group of layers."""
    plan, own = setup.plan, setup.originals.grid
    tiles = [(group, tile) for group in plan.groups for tile in _tiles(setup.blocks, plan.tile)]
    for group, tile in progress(tiles, "tiles", unit="tile"):
        held: dict[tuple[int, str], Features] = {}
        for number in progress(tile, "blocks of originals", unit="block"):
            block = Block(len(own.block_rows(number)))
            for rows in own.batches(own.block_rows(number)):
                head = setup.measurer.measure(setup.originals.batch(rows), block.add, set(group))
                block.next(len(rows))
                result.take_originals(rows, head)
            held |= {(number, layer): whole for layer, whole in block.features().items()}
        _pass_by(setup, result, held, group)


def _pass_by(
    setup: Setup, result: Result, held: Mapping[tuple[int, str], Features], group: Sequence[str]
) -> None:
    grid = setup.queries.grid
    numbers = sorted({number for number, _ in held})
    whole = range(len(grid.order))
    for rows in progress(grid.batches(whole), "queries", unit="batch"):

        def consume(layer: str, features: Features, rows: range = rows) -> None:
            for number in numbers:
                if (number, layer) in held:
                    block = setup.originals.grid.block_rows(number)
                    result.add(layer, rows, block, held[number, layer], features)

        head = setup.measurer.measure(setup.queries.batch(rows), consume, set(group))
        result.take_queries(rows, head)


def _tiles(blocks: range, size: int) -> Iterator[range]:
    return (blocks[start : start + size] for start in range(0, len(blocks), size))


def _from_store(setup: Setup, result: Result) -> None:
    """Make what is missing of the stored features, then go through them layer by layer."""
    first, second = _fill(setup)
    grids = setup.originals.grid, setup.queries.grid
    for rows in grids[0].batches(setup.rows):
        result.take_originals(rows, first.head(grids[0].number(rows)))
    passing = grids[1].batches(range(len(grids[1].order)))
    for rows in passing:
        result.take_queries(rows, second.head(grids[1].number(rows)))
    device = setup.measurer.device
    for layer in progress(setup.measurer.layers, "layers", unit="layer"):
        for tile in _tiles(setup.blocks, setup.plan.tile):
            held = {number: _held(first, grids[0], number, layer, device) for number in tile}
            for rows in passing:
                features = _moved(second.read(grids[1].number(rows), layer), device)
                for number, block in held.items():
                    if block is not None and features is not None:
                        result.add(layer, rows, grids[0].block_rows(number), block, features)


def _held(store: Store, grid: Grid, number: int, layer: str, device) -> Features | None:
    batches = grid.batches(grid.block_rows(number))
    found = [store.read(grid.number(rows), layer) for rows in batches]
    return None if None in found else _moved(concatenated(found), device)


def _moved(features: Features | None, device) -> Features | None:
    if features is None:
        return None
    if isinstance(features, Tensor):
        return features.to(device)
    return tuple(type(use)(*(part.to(device) for part in use)) for use in features)


def _fill(setup: Setup) -> tuple[Store, Store]:
    """Make the features that no job has made yet; what another is making is left to it at first."""
    sides = (setup.originals, setup.queries)
    stores = [
        Store(setup.features / side.digest, setup.identity, setup.measurer.layers) for side in sides
    ]
    passing = sides[1].grid.batches(range(len(sides[1].grid.order)))
    # Jobs that start together begin at different queries, so that they share the work.
    start = len(passing) * setup.blocks.start // max(1, setup.originals.grid.blocks)
    wanted = [(0, rows) for rows in sides[0].grid.batches(setup.rows)]
    wanted += [(1, rows) for rows in (*passing[start:], *passing[:start])]
    for wait in (False, True):
        left = []
        for side, rows in progress(wanted, "backward passes", unit="batch"):
            number = sides[side].grid.number(rows)
            samples = sides[side].batch(rows)
            if not stores[side].ensure(number, samples, setup.measurer, wait):
                left.append((side, rows))
        wanted = left
    return stores[0], stores[1]
