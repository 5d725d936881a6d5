"""Dots: the same bytes however many parts, and no gap, overlap or foreign part goes unseen."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from headroom.errors import InputError
from headroom.gradients.dots import Dots, merge, read, write, write_part

L, Q, N = 3, 5, 11
IDENTITY = {"model": "tiny", "loss": {"kind": "mean", "eos": True}, "dtype": "float32"}


def dots_of(rows, notes=IDENTITY):
    rng = np.random.default_rng(0)
    dot_LQN = rng.normal(size=(L, Q, N)).astype(np.float32)
    query_LQ, original_LN = rng.random((L, Q)), rng.random((L, N))
    return Dots(
        tuple(f"layer {i}" for i in range(L)),
        (4, 6, 2),
        tuple(f"q{i}" for i in range(Q)),
        tuple(f"o{i}" for i in rows),
        dot_LQN[:, :, rows],
        query_LQ,
        original_LN[:, rows],
        notes,
    )


def write_parts(folder, bounds, notes=IDENTITY):
    """Cut the grid's order, a shuffle of the corpus, at these bounds."""
    order, paths = np.random.default_rng(1).permutation(N), []
    for start, stop in bounds:
        paths.append(folder / f"{start}-{stop}-{len(paths)}.safetensors")
        write_part(paths[-1], dots_of(order[start:stop], notes), start, stop, N, order[start:stop])
    return paths


@pytest.mark.parametrize("parts", [1, 2, 7, N + 3])
def test_any_number_of_parts_gives_the_bytes_of_the_whole(tmp_path, parts):
    cuts = np.linspace(0, N, parts + 1).astype(int)
    paths = write_parts(tmp_path / "parts", pairwise(cuts))
    write(tmp_path / "merged", merge(paths[::-1]))
    write(tmp_path / "whole", dots_of(np.arange(N)))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    found = read(tmp_path / "merged")
    assert found.originals == tuple(f"o{i}" for i in range(N)) and found.notes == IDENTITY
    assert found.dot_LQN.dtype == np.float32 and found.sizes == (4, 6, 2)


def test_another_process_writes_the_same_bytes(tmp_path):
    write(tmp_path / "here", dots_of(np.arange(N)))
    code = (
        "import sys; from headroom.gradients.dots import read, write;"
        "write(sys.argv[2], read(sys.argv[1]))"
    )
    paths = [tmp_path / "here", tmp_path / "there"]
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env=environment)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([(0, 4), (6, 11)], r"no partition holds originals 4 to 5 of the grid's 11"),
        ([(0, 4), (4, 9)], r"no partition holds originals 9 to 10"),
        ([(3, 11)], r"originals 0 to 2 .*at the start"),
        ([(0, 0)], r"originals 0 to 10"),
        ([(0, 6), (4, 11)], r"4-11-1\S* holds originals 4 to 10 .*0-6-0\S* .*delete"),
        ([(0, 11), (0, 11)], r"partitions overlap"),
        ([(0, 11), (3, 5)], r"partitions overlap"),
    ],
)
def test_gaps_and_overlaps_are_refused(tmp_path, bounds, message):
    with pytest.raises(InputError, match=message) as caught:
        merge(write_parts(tmp_path, bounds))
    assert "\n" not in str(caught.value)


def test_a_foreign_part_is_named_with_what_differs(tmp_path):
    other = json.loads(json.dumps(IDENTITY))
    other["loss"]["eos"] = False
    paths = write_parts(tmp_path, [(0, 4), (4, 8)])
    order = np.random.default_rng(1).permutation(N)
    paths.insert(0, tmp_path / "foreign")
    write_part(paths[0], dots_of(order[8:], other), 8, N, N, order[8:])
    message = (
        r"foreign is a partition of another run: loss.eos is false, in \S+ it is true; .*delete"
    )
    with pytest.raises(InputError, match=message):
        merge(paths)
    changed = dots_of(order[8:])
    changed.query_LQ[1, 2] *= 2
    write_part(paths[0], changed, 8, N, N, order[8:])
    with pytest.raises(InputError, match=r"foreign .* other squared norms"):
        merge(paths)
    paths[0].write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"foreign holds no dot products .*delete"):
        merge(paths)
    write(paths[0], dots_of(order[8:]))
    with pytest.raises(InputError, match="foreign is no partition"):
        merge(paths)


def test_positions_must_be_each_place_once(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    write_part(paths[0], dots_of(np.arange(6)), 0, 6, N, range(6))
    write_part(paths[1], dots_of(np.arange(6, N)), 6, N, N, range(5, 10))
    with pytest.raises(InputError, match="each place once"):
        merge(paths)


def test_a_layer_of_rounding_alone_may_differ(tmp_path):
    """Keys' biases have no gradient: what rounding leaves there agrees in no digit."""
    paths = write_parts(tmp_path, [(0, 4), (4, 8)])
    order = np.random.default_rng(1).permutation(N)
    last = dots_of(order[8:])
    last.query_LQ[0] += 1e-9 * last.query_LQ.sum(0)
    write_part(tmp_path / "last", last, 8, N, N, order[8:])
    merge([*paths, tmp_path / "last"])
