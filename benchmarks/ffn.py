"""Speed of FFN pruning: beside the seed's procedure, and on one layer of 8B geometry.

    python benchmarks/ffn.py                          a small layer beside the seed's procedure
    python benchmarks/ffn.py --layer                  one layer of 8B geometry, stage by stage
    python benchmarks/ffn.py --model --device cuda    the whole shape, random weights, bfloat16

Prints Markdown tables; what is compared takes turns in one run, medians of the rounds.

The seed's procedure for a layer: features [gate | up | down], L1 distances (cdist), an exact plan
(ot.emd, uniform marginals), dense products with the column-normalised map.

Floors for n = 14336, k = 7168, D = 4096, N tokens, in FLOPs: Gram 2 N n² (symmetry not used),
Cholesky k³/3 = 1.2e11, its solves 2 k² D = 4.2e11, cosine costs 6 n k D = 2.5e12; L1 costs n k 3 D
= 1.3e12 operations that no GEMM does. The nearest-channel plan (target ``pushforward``) reads the
n k costs once; the network simplex is super-quadratic in n.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import ot
import torch
from torch.nn.functional import normalize, silu

from headroom.ffn.fusion import Layer, Transport, ot_mass, ridge
from headroom.ffn.layers import FFN
from headroom.ffn.marginals import Evidence, marginals
from headroom.ffn.transport import CostView, costs, solve

SMALL = {"width": 256, "channels": 1024, "tokens": 4096}
LARGE = {"width": 4096, "channels": 14336, "tokens": 2048}


def random_layer(settings: argparse.Namespace, sizes: dict, dtype=torch.float32) -> Layer:
    """A layer of Gaussian weights and inputs."""
    generator = torch.Generator().manual_seed(0)
    width, channels = sizes["width"], sizes["channels"]
    shapes = [(channels, width), (channels, width), (width, channels)]
    weights = [torch.randn(s, generator=generator) / s[1] ** 0.5 for s in shapes]
    ffn = FFN(*(w.to(settings.device).double() for w in weights), None, None, None, silu)
    inputs_TD = torch.randn(sizes["tokens"], width, generator=generator).to(dtype)
    return Layer(ffn, [inputs_TD[None].to(settings.device)], 1e-3)


def fresh(layer: Layer) -> Layer:
    """The same layer with nothing computed yet."""
    return Layer(layer.dense, layer.inputs, layer.ridge)


def features(layer: Layer) -> torch.Tensor:
    """Canonical features, L2-normalised."""
    ffn = layer.canonical
    return normalize(torch.cat([ffn.gate_nD, ffn.up_nD, ffn.down_Dn.T], dim=1), dim=1)


def plan(layer: Layer, kept_k: torch.Tensor, strategy: str, cost: str) -> Transport:
    """Cost, marginals and exact plan, as the study makes them."""
    cost_nk = costs(cost, CostView(features(layer)), kept_k.to(layer.dense.gate_nD.device))
    n = layer.dense.channels
    a_n, b_k = marginals(strategy, Evidence(np.ones(n), {}), kept_k.numpy(), cost_nk)
    return Transport(solve("exact", a_n, b_k, cost_nk, {}), a_n, b_k)


def seed_procedure(layer: Layer, kept_k: torch.Tensor) -> None:
    """L1 distances, exact uniform plan, dense products."""
    ffn = layer.dense
    rows = normalize(torch.cat([ffn.gate_nD, ffn.up_nD, ffn.down_Dn.T], dim=1).float(), dim=1)
    cost_nk = torch.cdist(rows, rows[kept_k], p=1).double().cpu().numpy()
    n, k = cost_nk.shape
    found = ot.emd(np.full(n, 1 / n), np.full(k, 1 / k), cost_nk, numItermax=10**7)
    map_kn = torch.from_numpy(found.T / found.sum(1)).float().to(rows.device)
    for weight in (ffn.gate_nD, ffn.up_nD, ffn.down_Dn.T):
        torch.einsum("kn,nd->kd", map_kn, weight.float())


def timed(work, device: str) -> float:
    """Seconds of one call, the device's work included."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare_small(settings: argparse.Namespace) -> None:
    """The seed's procedure against transport and ridge on one small layer, in turns."""
    layer, sizes = random_layer(settings, SMALL), SMALL
    kept_k = torch.arange(0, sizes["channels"], 2)
    works = {
        "seed: L1 cdist, exact uniform plan, dense einsum": lambda: seed_procedure(layer, kept_k),
        "uniform plan, cosine, sparse fusion": lambda: ot_mass(
            layer, kept_k, plan(fresh(layer), kept_k, "uniform", "cosine")
        ),
        "pushforward plan, cosine, sparse fusion": lambda: ot_mass(
            layer, kept_k, plan(fresh(layer), kept_k, "pushforward", "cosine")
        ),
        "ridge: Gram, Cholesky, solve": lambda: ridge(fresh(layer), kept_k, None),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(settings.rounds + 1):
        for name, work in works.items():
            seconds = timed(work, settings.device)
            if turn:  # the first one warms up
                times[name].append(seconds)
    base = statistics.median(times[next(iter(works))])
    print(f"\none layer, D = {sizes['width']}, n = {sizes['channels']}, half kept, ", end="")
    print(f"{sizes['tokens']} tokens, {settings.device}, {settings.threads} threads\n")
    print("| work | seconds | seed's time / this |\n|---|---|---|")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.3f} | {base / middle:.1f} |")


def large_layer(settings: argparse.Namespace) -> None:
    """One layer of 8B geometry, stage by stage."""
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    layer = random_layer(settings, LARGE, dtype)
    kept_k = torch.arange(0, LARGE["channels"], 2)
    device_k = kept_k.to(settings.device)
    kept: dict = {}
    view = CostView(features(layer))
    even = np.full(LARGE["channels"], 1 / LARGE["channels"]), np.full(len(kept_k), 1 / len(kept_k))
    evidence = Evidence(np.ones(LARGE["channels"]), {})

    def pushed() -> None:
        a_n, b_k = marginals("pushforward", evidence, kept_k.numpy(), kept["cost"])
        kept["plan"] = Transport(solve("exact", a_n, b_k, kept["cost"], {}), a_n, b_k)

    stages = {
        f"Gram and moments of {LARGE['tokens']} tokens": lambda: (layer.weight, layer.gram_nn),
        "ridge: Cholesky and solve": lambda: ridge(layer, device_k, None),
        "cosine costs": lambda: kept.update(cost=costs("cosine", view, device_k)),
        "pushforward plan": pushed,
        "sparse fusion": lambda: ot_mass(layer, device_k, kept["plan"]),
        "exact uniform plan (network simplex)": lambda: solve("exact", *even, kept["cost"], {}),
    }
    print(f"\none layer of 8B geometry, {settings.device}, {settings.threads} threads\n")
    print("| stage | seconds |\n|---|---|")
    for name, stage in stages.items():
        print(f"| {name} | {timed(stage, settings.device):.1f} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if settings.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"| peak memory, GiB | {peak:.1f} |")


def whole_model(settings: argparse.Namespace) -> None:
    """Prune every layer of 8B geometry with random weights: activations, ridge, transport."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from headroom.ffn.observe import observe
    from headroom.ffn.pipeline import prune_model
    from headroom.ffn.task import Source
    from headroom.recipes import parse_step

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        num_hidden_layers=settings.layers,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=32000,
    )
    with torch.device(settings.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    tensors, plain = model.state_dict(), config.to_dict()
    tokens_NT = torch.randint(32000, (128, 1024), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    found = observe(model, tensors, plain, tokens_NT, 1e-3)
    print(f"\n{settings.layers} layers of 8B geometry, 128 x 1024 tokens, {settings.device}\n")
    print(f"| work | seconds |\n|---|---|\n| activations | {time.perf_counter() - started:.1f} |")
    wanted = {"ridge": 1e-3, "multiple": 1, "transport": {"mass": 0.8}}
    source = Source(
        model,
        tensors,
        plain,
        found,
        None,
        tokens_NT,
        tokens_NT[:8],
        wanted,
        workers=settings.workers,
    )
    for step in ("ridge-r0.50", "ot_mass-r0.50", "ot_mass-r0.50-uniform"):
        started = time.perf_counter()
        prune_model(source, [parse_step(f"prune-flap-{step}")])
        print(f"| prune-flap-{step} | {time.perf_counter() - started:.1f} |", flush=True)
    if settings.device == "cuda":
        print(f"| peak memory, GiB | {torch.cuda.max_memory_allocated() / 2**30:.1f} |")


def main() -> None:
    """Read the arguments and run what they name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", action="store_true", help="one layer of 8B geometry")
    parser.add_argument("--model", action="store_true", help="the whole 8B geometry")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--workers", type=int, default=16, help="exact plans at once")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.layer:
        large_layer(settings)
    elif settings.model:
        whole_model(settings)
    else:
        compare_small(settings)


if __name__ == "__main__":
    main()
