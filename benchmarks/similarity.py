"""Speed and memory of head similarity beside a plain forward pass and the naive version.

    python benchmarks/similarity.py                                  8 x 512 random Llama, CPU
    python benchmarks/similarity.py --checkpoint PATH --lengths 512
    python benchmarks/similarity.py --device cuda --geometry 8b      Llama-3-8B's shape, bfloat16

Prints a Markdown table. ``ratio`` = time of a pass / time of a plain forward pass (base model and
vocabulary) over the same tokens, both in one run, alternating; the median of the rounds. ``naive``
keeps the maps of all layers and sequences of a batch, then compares them. ``memory`` is the most
that a pass adds to the loaded model: on a GPU allocated memory, on a CPU resident memory of a
process of its own. With one thread, seconds are CPU time, which other programs disturb less.

The floor of one metric (causal, a layer and sequence): T²Hd FLOPs for the scores, T²H² for the Gram
and 2T²H floats through the cache, against 2·T·(parameters of a layer) for the model: 5 % of the
FLOPs at 8 x 512 with T = 512, half as much at T = 256, 72 % for stories260K (d = 8) at T = 512.
The last layer's feed-forward block and the vocabulary are skipped, so a ratio can be below 1.

Shapes: B sequences, T tokens, H query heads, G key/value heads, d head size.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headroom.attention import tapped
from headroom.heads.similarity import similarity_pass

GEOMETRIES = {
    "8x512": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": 4096,
    },
    "8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}
METRICS = ("relu", "softmax", "scores", "output")


def build(settings: argparse.Namespace):
    """Load the checkpoint, or make a random model on the device itself."""
    dtype = getattr(torch, settings.dtype)
    if settings.checkpoint:
        model = AutoModelForCausalLM.from_pretrained(
            settings.checkpoint, dtype=dtype, local_files_only=True
        )
        return model.to(settings.device).eval()
    sizes = dict(GEOMETRIES[settings.geometry], max_position_embeddings=8192)
    sizes["num_hidden_layers"] = settings.layers or sizes["num_hidden_layers"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(settings.device):
            return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    finally:
        torch.set_default_dtype(before)


def naive(model, tokens_BT, metric: str) -> list[torch.Tensor]:
    """Keep every layer's maps (B, H, T, T), then compare the heads."""
    kept = []

    def keep(module, q_BHTd, k_BGTd, v_BGTd, z_BTHd):
        k_BHTd = k_BGTd.repeat_interleave(q_BHTd.shape[1] // k_BGTd.shape[1], 1)
        scores_BHTT = q_BHTd.float() @ k_BHTd.float().transpose(2, 3)
        future_TT = torch.ones_like(scores_BHTT[0, 0], dtype=torch.bool).triu(1)
        if metric == "softmax":
            scores_BHTT = (scores_BHTT * module.scaling).masked_fill(future_TT, -math.inf)
            kept.append(scores_BHTT.softmax(-1))
        else:
            scores_BHTT = scores_BHTT.masked_fill(future_TT, 0)
            kept.append(scores_BHTT.relu() if metric == "relu" else scores_BHTT)

    with tapped(model, keep):
        model.base_model(input_ids=tokens_BT, use_cache=False)
    return [torch.einsum("bhij,bgij->hg", maps, maps) for maps in kept]


def passes(model, tokens_BT, tf32: bool) -> dict:
    """Name what is measured."""
    batch = len(tokens_BT)

    def streamed(metric: str):
        return lambda: similarity_pass(model, tokens_BT, metric, batch=batch, tf32=tf32)

    def stored(metric: str):
        return lambda: naive(model, tokens_BT, metric)

    return {
        "plain": lambda: model(tokens_BT, use_cache=False).logits.sum(),
        **{metric: streamed(metric) for metric in METRICS},
        **{f"naive {metric}": stored(metric) for metric in ("relu", "softmax", "scores")},
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def times(settings, model, length: int) -> dict[str, float]:
    """Return seconds of each pass: median over rounds that run all of them in turn."""
    functions = passes(model, tokens(settings, model, length), settings.tf32)
    if settings.skip_naive:
        functions = {name: f for name, f in functions.items() if not name.startswith("naive")}
    one_thread = settings.device == "cpu" and settings.threads == 1
    clock = time.process_time if one_thread else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(settings.rounds + 1):
        for name, function in functions.items():
            synchronize(settings.device)
            start = clock()
            function()
            synchronize(settings.device)
            seconds[name].append(clock() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def tokens(settings, model, length: int) -> torch.Tensor:
    """Return random tokens (B, T)."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, length)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(settings.device)


@torch.no_grad()
def peak(settings, name: str, length: int, model=None) -> float:
    """Return MiB that a pass adds to the loaded model."""
    model = model or build(settings)
    inputs_BT = tokens(settings, model, length)
    if settings.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes(model, inputs_BT, settings.tf32)[name]()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    torch.set_num_threads(settings.threads)
    model.base_model(input_ids=inputs_BT[:1, :8])  # what any pass needs is there before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = resident("VmRSS")
    passes(model, inputs_BT, settings.tf32)[name]()
    return (resident("VmHWM") - before) / 2**10


def resident(key: str) -> int:
    """Return KiB of resident memory, now (VmRSS) or at most (VmHWM); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def memory(settings, model, name: str, length: int) -> float:
    """Measure the peak here on a GPU, in a fresh process on a CPU."""
    if settings.device == "cuda":
        return peak(settings, name, length, model)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, settings, name, length).result()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of head similarity.")
    parser.add_argument("--checkpoint", help="a transformers folder instead of a random model")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="8x512")
    parser.add_argument("--layers", type=int, help="fewer layers than the geometry has")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--batch", type=int, default=4, help="sequences a pass")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="default: float32, bfloat16 for 8b")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tf32", action="store_true", help="TF32 also where it rounds")
    parser.add_argument("--skip-naive", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    settings = parser.parse_args()
    if settings.geometry == "8b" and settings.device == "cpu" and not settings.checkpoint:
        parser.error("--geometry 8b needs --device cuda")
    settings.dtype = settings.dtype or ("bfloat16" if settings.geometry == "8b" else "float32")
    return settings


def main() -> None:
    """Print the table."""
    settings = parse()
    torch.set_num_threads(settings.threads)
    model = build(settings)
    where = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    what = "checkpoint" if settings.checkpoint else settings.geometry
    print(
        f"{what}, {model.config.num_hidden_layers} layers, {settings.dtype},"
        f" batch {settings.batch}, {where}, {settings.threads} threads, torch {torch.__version__},"
        f" median of {settings.rounds} rounds\n"
    )
    print("| T | pass | ms a sequence | ratio to plain forward | memory, MiB |")
    print("|---|---|---|---|---|")
    for length in settings.lengths:
        seconds = times(settings, model, length)
        for name, value in seconds.items():
            ratio = value / seconds["plain"]
            used = "" if settings.skip_memory else f"{memory(settings, model, name, length):.0f}"
            milliseconds = 1000 * value / settings.batch
            print(f"| {length} | {name} | {milliseconds:.2f} | {ratio:.2f} | {used} |", flush=True)


if __name__ == "__main__":
    main()
