"""What auto chooses and what a plan costs, against closed forms."""

import pytest

from headroom.errors import InputError
from headroom.gradients.choose import WRITTEN, Work, choose, exact_cost, ghost_cost
from headroom.gradients.planner import Plan, Sizes, feature_elements, make_plan, pair_flops

WORK = Work(originals=100, queries=50, length=16)


def test_costs_are_their_closed_forms():
    assert exact_cost((8, 4), WORK) == 2 * 32 * (150 * (16 + WRITTEN) + 100 * 50)
    assert ghost_cost((8, 4), WORK, 0.5) == 2 * 100 * 50 * 16**2 * (8 + 4) / 0.5
    assert ghost_cost((8, 4), WORK, 1.0, lookup=True) == 2 * 100 * 50 * 16**2 * 4


@pytest.mark.parametrize("length", [4, 16, 24, 25, 64])
@pytest.mark.parametrize("shape", [(64, 32), (512, 192), (2048, 8)])
def test_auto_is_ghost_exactly_where_its_inequality_holds(shape, length):
    o, i = shape
    c, N, Q, T = 0.5, 40, 60, length
    wanted = T**2 * (o + i) < c * o * i * (1 + (T + WRITTEN) * (1 / N + 1 / Q))
    found = choose("auto", {"w": shape}, [], Work(N, Q, T), c)
    assert found == {"w": "ghost" if wanted else "exact"}


def test_vectors_are_exact_and_a_named_backend_is_everywhere():
    shapes = {"bias": (4096,), "w": (4096, 4096)}
    work = Work(10, 10, 4)
    assert choose("auto", shapes, [], work, 0.5) == {"bias": "exact", "w": "ghost"}
    for backend in ("exact", "ghost", "projection", "two_sided"):
        assert set(choose(backend, shapes, [], work, 0.5).values()) == {backend}


def test_an_embedding_that_is_only_looked_up_is_ghost_for_longer():
    shapes = {"embedding": (1000, 16)}
    work = Work(100, 100, 24)
    assert choose("auto", shapes, [], work, 0.5) == {"embedding": "exact"}
    assert choose("auto", shapes, ["embedding"], work, 0.5) == {"embedding": "ghost"}


def sizes(**changes) -> Sizes:
    found = Sizes(
        feature_bytes={"a": 400, "b": 800, "c": 400},
        group_bytes=1200,
        pair_flops=800.0,
        parameters={"a": 100, "b": 200, "c": 100},
        originals=40,
        queries=10,
        part=20,
        tokens=50 * 6,
        longest=8,
        activations=1000,
        element=4,
        batch=2,
        block=4,
    )
    return found._replace(**changes)


def test_a_plan_that_fits_the_disk_passes_each_sample_once():
    plan = make_plan(sizes(), memory_gb=1, disk_gb=50 * 1600 / 1e9)
    assert (plan.stored, plan.passes, plan.disk) == (True, 20 + 10, 50 * 1600)
    assert plan.groups == [["a"], ["b"], ["c"]] and plan.tile == 5
    assert plan.flops == 6 * 400 * 6 * 30 + 2 * 20 * 10 * 400


@pytest.mark.parametrize(
    ("held", "groups", "tile", "passes"),
    [
        (20 * 1600, [["a", "b", "c"]], 5, 20 + 10),  # all at once
        (8 * 1600, [["a", "b", "c"]], 2, 20 + 10 * 3),  # 3 tiles of 2 blocks
        (4 * 1600, [["a", "b", "c"]], 1, 20 + 10 * 5),
        (4 * 1200, [["a", "b"], ["c"]], 1, 2 * (20 + 10 * 5)),
        (4 * 800, [["a"], ["b"], ["c"]], 1, 3 * (20 + 10 * 5)),
    ],
)
def test_tiles_and_groups_are_those_with_the_fewest_passes(held, groups, tile, passes):
    plan = make_plan(sizes(), memory_gb=held / 1e9, disk_gb=0)
    assert isinstance(plan, Plan) and not plan.stored and plan.disk == 0
    assert (plan.groups, plan.tile, plan.passes) == (groups, tile, passes)


def test_what_is_held_stays_within_memory():
    for held in range(3200, 40000, 700):
        plan = make_plan(sizes(), memory_gb=held / 1e9, disk_gb=0)
        widest = max(sum(sizes().feature_bytes[name] for name in group) for group in plan.groups)
        assert plan.tile * 4 * widest <= held


def test_memory_does_not_grow_with_the_number_of_originals_of_other_partitions():
    one, ten = (make_plan(sizes(originals=n), 1e-4, 0) for n in (40, 400))
    assert one.memory == ten.memory


def test_one_layer_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"gradients.memory_gb is 3.1e-06.*one layer of one block"):
        make_plan(sizes(), memory_gb=3.1e-6, disk_gb=0)


def test_bytes_of_features_by_backend():
    shapes = {"w": (100, 30), "norm": (30,)}
    own = {"projection": {"dimension": 64}, "two_sided": {"outer": 8, "inner": 50}}

    def elements(backend):
        found = feature_elements(dict.fromkeys(shapes, backend), shapes, {}, 7, own)
        return found["w"], found["norm"]

    assert elements("exact") == (3000, 30)
    assert elements("ghost") == (7 * 130, 30)
    assert elements("projection") == (64, 30)
    assert elements("two_sided") == (8 * 30, 30)


def test_embeddings_keep_tokens_and_not_a_vocabulary():
    """A table that is looked up keeps its rows' gradients and 8 bytes a token; a tied one both."""
    shapes, own = {"e": (50000, 16)}, {}
    kept = {tied: feature_elements({"e": "ghost"}, shapes, {"e": tied}, 7, own) for tied in (0, 1)}
    assert kept[0]["e"] == 7 * (2 + 16)
    assert kept[1]["e"] == kept[0]["e"] + 7 * (50000 + 16)


def test_operations_of_a_pair():
    elements = {"a": 10, "b": 20}
    assert pair_flops({"a": "exact", "b": "ghost"}, elements, 7) == 2 * 10 + 2 * 20 * 7
