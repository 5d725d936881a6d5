"""Cost of per-layer gradient similarity: against plain passes, kronfluence, ghost; its memory.

    python benchmarks/gradients.py                             all parts, random models, a CPU
    python benchmarks/gradients.py --parts cost --model PATH   a checkpoint's own sizes
    python benchmarks/gradients.py --parts throughput --device cuda --batch 8

cost: all pairs of N originals and M queries, all layers, exact, beside N + M plain backward passes
(with gradients of the weights) of the same micro-batches. A plain pass is 6PT operations; gradients
by sample are the same 2PT as the weights', all pairs are 2NMP: the floor is 1 + NM / (3T(N + M)).
What a pass of bytes costs comes on top: 4P a sample written, read for norm and product.
kronfluence: its pairwise scores by module with the strategy ``identity``, on the same untied linear
layers and samples. crossover: exact against ghost products, and what ``auto`` makes of it.
memory: peak of a process that measures a partition when the sets grow tenfold and partitions with
them, beside the plan's estimate. throughput: samples a second by backend, by default of 1B geometry
on a GPU.

What is compared takes turns in one run; medians of the rounds after a first that warms up. On a CPU
times are those of the process (one thread), split in user and system: the system's share is memory
that is touched for the first time.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor, nn

from headroom.gradients import measure
from headroom.gradients.capture import Batch, Capture, answer_losses, pad
from headroom.gradients.choose import Work, choose
from headroom.gradients.encoding import Encoded
from headroom.gradients.grid import make_grid
from headroom.gradients.planner import Plan
from headroom.gradients.setup import Setup, Side, prepare
from headroom.gradients.similarity import Measurer
from headroom.gradients.uses import (
    Outer,
    dense_dots,
    dense_squares,
    ghost_dots,
    ghost_squares,
    materialise,
)

PARTS = ("cost", "kronfluence", "crossover", "memory", "throughput")
OWN = {
    "template": {"prompt": "{prompt} :"},
    "length": 4096,
    "too_long": "skip",
    "ghost_speed": 0.5,
    "projection": {"dimension": 1024, "seed": 0},
    "two_sided": {"inner": 32, "outer": 32, "seed": 0},
}


class Size(NamedTuple):
    """Of a random Llama and its samples."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int
    count: int  # N = M
    length: int  # T


SMALL = Size(192, 512, 6, 8, 4096, 64, 128)
MIDDLE = Size(512, 1408, 2, 8, 4096, 16, 256)
TINY = Size(32, 64, 2, 4, 256, 8, 16)
BILLION = Size(2048, 8192, 16, 16, 50304, 16, 512)


def llama(size: Size, tied: bool = True, device: str = "cpu"):
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def random_samples(count: int, length: int, vocabulary: int, seed: int) -> list:
    """Samples of one length whose answer begins after an eighth."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (count, length), generator=draw).tolist()
    return [(row, max(1, length // 8)) for row in tokens]


def ragged_samples(count: int, vocabulary: int, seed: int) -> list:
    """Samples with the spread of LIMA's lengths (log-normal, sigma .93), 16 to 256 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = (96 * torch.exp(0.93 * torch.randn(count, generator=draw))).clamp(16, 256).int()
    return [
        random_samples(1, length, vocabulary, 1000 * seed + place)[0]
        for place, length in enumerate(lengths.tolist())
    ]


def setup_of(
    capture: Capture, sides: Sequence, choice: Mapping, batch: int, groups: Sequence | None = None
) -> Setup:
    """What a partition of all originals, in one tile, is measured with."""

    def side(samples: Sequence) -> Side:
        encoded = Encoded([str(place) for place in range(len(samples))], samples, {})
        return Side(encoded, make_grid(encoded.lengths, batch, max(64, batch)), "")

    originals, queries = map(side, sides)
    blocks = range(originals.grid.blocks)
    layers = list(groups or capture.shapes)
    plan = Plan(
        stored=False,
        groups=[layers],
        tile=len(blocks),
        passes=sum(map(len, sides)),
        flops=0,
        pass_flops=0,
        memory=0,
        disk=0,
    )
    measurer = Measurer(capture, choice, OWN, batch)
    return Setup(originals, queries, measurer, blocks, plan, {}, Path())


def clock(device: str) -> tuple[float, float]:
    """Seconds of the process, and those of the system in it; on a GPU of the wall."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter(), 0.0
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime


def timed(device: str, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that work takes, and the system's in them."""
    before = clock(device)
    work()
    return tuple(b - a for a, b in zip(before, clock(device), strict=True))


def plain_passes(model, sides: Sequence, batch: int) -> None:
    """Backward passes with gradients of the weights, and no more."""
    model.requires_grad_(True)
    for samples in sides:
        for start in range(0, len(samples), batch):
            model.zero_grad(set_to_none=True)
            some = pad(samples[start : start + batch], str(model.device))
            losses_n = answer_losses(model(some.tokens_nT, use_cache=False).logits, some)
            losses_n.sum().backward()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def cost(settings: argparse.Namespace) -> None:
    """Print exact all pairs beside plain backward passes."""
    print("\nSeconds: of the process, of the system in them.\n")
    print("| parameters | N = M | T | micro-batch | plain | all pairs | ratio | user's | floor |")
    print("|---|---|---|---|---|---|---|---|---|")
    if settings.model is not None:
        from headroom.checkpoints import load_model

        model = load_model(settings.model, settings.device, "float32")
        print(_cost_of(settings, model, SMALL), flush=True)
        return
    for size in [SMALL, MIDDLE] if settings.device == "cpu" else [MIDDLE]:
        print(_cost_of(settings, llama(size, device=settings.device), size), flush=True)


def _cost_of(settings: argparse.Namespace, model, size: Size) -> str:
    sides = [
        random_samples(size.count, size.length, model.config.vocab_size, seed) for seed in (1, 2)
    ]
    capture = Capture(model)
    setup = setup_of(capture, sides, dict.fromkeys(capture.shapes, "exact"), settings.batch)
    ways = (
        lambda: plain_passes(model, sides, settings.batch),
        lambda: measure.measure(setup),
    )
    turns = [[timed(settings.device, way) for way in ways] for _ in range(settings.rounds + 1)]
    plain, ours = zip(*turns[1:], strict=True)
    return _cost_row(model, size, settings.batch, plain, ours)


def _cost_row(model, size: Size, batch: int, plain: Sequence, ours: Sequence) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    ratio = statistics.median(a[0] / b[0] for a, b in zip(ours, plain, strict=True))
    user = statistics.median(
        (a[0] - a[1]) / (b[0] - b[1]) for a, b in zip(ours, plain, strict=True)
    )
    middle = [
        " ".join(f"{statistics.median(column):.2f}" for column in zip(*found, strict=True))
        for found in (plain, ours)
    ]
    return (
        f"| {parameters:,} | {size.count} | {size.length} | {batch} | {middle[0]} | {middle[1]} | "
        f"{ratio:.2f} | {user:.2f} | {1 + size.count / (6 * size.length):.2f} |"
    )


def kronfluence(settings: argparse.Namespace) -> None:
    """Print pairwise scores by module beside kronfluence's: samples of one length, and of many."""
    missing = [name for name in ("kronfluence", "accelerate") if find_spec(name) is None]
    if missing:
        print(f"\nkronfluence: skipped, not installed: {', '.join(missing)}")
        return
    size = SMALL._replace(count=32, layers=3)
    same = [random_samples(size.count, size.length, size.vocabulary, seed) for seed in (1, 2)]
    many = [ragged_samples(64, size.vocabulary, seed) for seed in (1, 2)]
    ways = [(16, 16, False), (32, 8, False), (32, 16, False), (32, 32, False)]
    _beside_kronfluence(settings, size, "one length, 128 tokens", same, ways)
    ways = [(q, t, order) for order in (False, True) for q, t in ((64, 8), (64, 16), (64, 32))]
    _beside_kronfluence(settings, size, "lengths spread as LIMA's", many, ways)


def _beside_kronfluence(settings, size: Size, name: str, sides: Sequence, ways: Sequence) -> None:
    """Print one table; ways are query batch, other batch, and whether samples come by length."""
    capture = Capture(llama(size, tied=False, device=settings.device))
    linear = [name for name, m in capture.model.named_modules() if isinstance(m, nn.Linear)]
    layers = [f"{name}.weight" for name in linear]
    # The embedding is no layer of theirs: as a ghost it isn't written out for nothing.
    choice = dict.fromkeys(capture.shapes, "exact") | {"model.embed_tokens.weight": "ghost"}
    setup = setup_of(capture, sides, choice, settings.batch, layers)
    found: dict[str, list[float]] = {}
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        theirs = _Kronfluence(llama(size, tied=False, device=settings.device), linear, folder)
        work: dict[str, Callable] = {"headroom": lambda: measure.measure(setup)}
        for way in ways:
            label = f"{way[0]} queries, {way[1]} others" + ", sorted by length" * way[2]
            work[label] = lambda way=way: theirs.scores(sides, *way)
        for turn in range(settings.rounds + 1):
            for label, do in work.items():
                seconds = timed(
                    settings.device, lambda do=do, label=label: results.update({label: do()})
                )[0]
                if turn:
                    found.setdefault(label, []).append(seconds)
    lengths = [len(tokens) for side in sides for tokens, _ in side]
    print(
        f"\n{name}: {len(sides[0])} x {len(sides[1])} samples of {min(lengths)} to {max(lengths)}"
    )
    results |= {"order": setup.originals.grid.order}
    _print_kronfluence(settings, found, results, linear)


def _print_kronfluence(settings, found: Mapping, results: Mapping, linear: Sequence[str]) -> None:
    ours = results["headroom"]
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    best = min((name for name in middle if name != "headroom"), key=middle.get)
    error = 0.0
    for name in linear:
        place = ours.place[f"{name}.weight"]
        queries, originals = ours.query_QL[:, place], ours.original_NL[:, place]
        scale = torch.from_numpy((queries[:, None] * originals) ** 0.5)
        theirs = results[best][name].double().cpu()[:, results["order"]]
        off = theirs - torch.from_numpy(ours.dot_LQN[place]).double()
        error = max(error, float((off.abs() / scale).max()))
    print("\n| who | micro-batch | seconds | times headroom's |\n|---|---|---|---|")
    print(f"| headroom | {settings.batch} | {middle['headroom']:.2f} | 1 |")
    for name, seconds in middle.items():
        if name != "headroom":
            print(f"| kronfluence | {name} | {seconds:.2f} | {seconds / middle['headroom']:.2f} |")
    print(f"\nlargest difference / (‖g‖‖h‖), {len(linear)} layers, at its best: {error:.1e}")


def _collated(samples: Sequence) -> dict[str, Tensor]:
    """A batch for kronfluence, padded to its own longest sample."""
    return pad(samples, "cpu")._asdict()


class _Kronfluence:
    """Kronfluence's analyzer of a model's linear layers."""

    def __init__(self, model, linear: Sequence[str], folder: str):
        import logging

        from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
        from kronfluence.utils.dataset import DataLoaderKwargs

        class Answers(Task):
            def compute_train_loss(self, batch, model, sample=False):
                some = Batch(**batch)
                logits = model(some.tokens_nT, use_cache=False).logits
                return answer_losses(logits, some).sum()

            def compute_measurement(self, batch, model):
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self):
                return list(linear)

        task = Answers()
        self.analyzer = Analyzer(
            "benchmark",
            prepare_model(model, task),
            task,
            cpu=model.device.type == "cpu",
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=folder,
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_collated))
        self.arguments = ScoreArguments(compute_per_module_scores=True)
        self.factors = FactorArguments(strategy="identity")
        self.fitted = False

    def scores(self, sides: Sequence, queries: int, train: int, by_length: bool) -> dict:
        """Scores (Q, N) by module."""
        places = [
            sorted(range(len(side)), key=lambda place, side=side: len(side[place][0]) * by_length)
            for side in sides
        ]
        sets = [[side[i] for i in order] for side, order in zip(sides, places, strict=True)]
        if not self.fitted:
            self.analyzer.fit_all_factors(
                "identity", sets[0], factor_args=self.factors, per_device_batch_size=8
            )
            self.fitted = True
        found = self.analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="identity",
            query_dataset=sets[1],
            train_dataset=sets[0],
            per_device_query_batch_size=queries,
            per_device_train_batch_size=train,
            score_args=self.arguments,
            overwrite_output_dir=True,
        ) or self.analyzer.load_pairwise_scores("scores")
        originals, asked = (torch.argsort(torch.tensor(order)) for order in places)
        return {name: scores[asked][:, originals] for name, scores in found.items()}


def crossover(settings: argparse.Namespace) -> None:
    """Print times of exact and ghost products, and what auto's choice loses by its constant."""
    speeds = (0.125, 0.25, 0.35, 0.5, 0.7, 1.0)
    print("\n| o x i | N = M | T | exact, ms | ghost, ms | auto at .5 | its time / the better's |")
    print("|---|---|---|---|---|---|---|")
    regrets: dict[float, list[float]] = {speed: [] for speed in speeds}
    rates: list[float] = []
    for shape in ((64, 64), (192, 192), (512, 192), (768, 768)):
        for count in (8, 32):
            for length in (4, 8, 16, 32, 64, 128):
                exact, ghost = _both(settings.device, shape, count, length)
                pairs = 2 * count * count * length * length * sum(shape)
                rates.append(pairs / ghost)
                for speed in speeds:
                    taken = _auto(shape, count, length, speed)
                    time_taken = ghost if taken == "ghost" else exact
                    regrets[speed].append(time_taken / min(exact, ghost))
                print(
                    f"| {shape[0]} x {shape[1]} | {count} | {length} | {1e3 * exact:.2f} | "
                    f"{1e3 * ghost:.2f} | {_auto(shape, count, length, 0.5)} | "
                    f"{regrets[0.5][-1]:.2f} |"
                )
    square = torch.randn(1536, 1536, device=settings.device)
    peak = 2 * 1536**3 / min(timed(settings.device, lambda: square @ square)[0] for _ in range(5))
    quarter = statistics.quantiles([rate / peak for rate in rates], n=4)
    print(
        f"\nlarge matrix products: {peak / 1e9:.0f} GFLOP/s; ghost's, as a share (c), quartiles: "
        + ", ".join(f"{value:.2f}" for value in quarter)
    )
    print("\n| ghost_speed | largest time / the better's | mean | above 1.3 |\n|---|---|---|---|")
    for speed, found in regrets.items():
        above = sum(regret > 1.3 for regret in found)
        mean = statistics.mean(found)
        print(f"| {speed} | {max(found):.2f} | {mean:.3f} | {above} of {len(found)} |")


def _auto(shape: tuple, count: int, length: int, speed: float) -> str:
    return choose("auto", {"w": shape}, [], Work(count, count, length), speed)["w"]


def _both(device: str, shape: tuple, count: int, length: int) -> tuple[float, float]:
    """Seconds of exact and ghost products of two sets, with squared norms; best of some turns."""
    draw = torch.Generator().manual_seed(0)
    first, second = (
        (Outer(*(torch.randn(count, length, side, generator=draw).to(device) for side in shape)),)
        for _ in range(2)
    )

    def exact() -> None:
        g, h = (materialise(uses, shape) for uses in (first, second))
        dense_dots(g, h), dense_squares(g), dense_squares(h)

    def ghost() -> None:
        ghost_dots(first, second), ghost_squares(first), ghost_squares(second)

    turns = [(timed(device, exact)[0], timed(device, ghost)[0]) for _ in range(4)]
    return tuple(map(min, zip(*turns, strict=True)))


def memory(settings: argparse.Namespace) -> None:
    """Print the peak of a process as the sets grow, beside the plan's estimate."""
    print("\n| way | originals, queries | partitions | interpreter, MB | peak, MB | plan, MB | "
          "(peak - interpreter) / plan |\n|---|---|---|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for way in ("tiled", "stored"):
            for grown in (1, 10):
                command = [sys.executable, __file__, "--child", folder, way, str(grown)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                own, peak, plan, sizes = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {way} | {sizes} | {grown} | {own:.0f} | {peak:.0f} | {plan:.0f} | "
                    f"{(peak - own) / plan:.2f} |",
                    flush=True,
                )


def write_inputs(folder: Path) -> None:
    """Write a random checkpoint with a tokenizer, and sets of 20 and 200 samples."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", ":", "<u>", *(f"w{number}" for number in range(2044))]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<u>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder / "model")
    llama(Size(256, 704, 2, 4, len(words), 0, 0)).save_pretrained(folder / "model")
    for name, seed in (("originals", 1), ("queries", 2)):
        for grown in (1, 10):
            rows = []
            for place, (tokens, _) in enumerate(random_samples(20 * grown, 60, 2044, seed)):
                text = [f"w{token}" for token in tokens]
                row = {"prompt": " ".join(text[:20]), "answer": " ".join(text[20:])}
                rows.append(json.dumps({"id": str(place), **row}) + "\n")
            (folder / f"{name}{grown}.jsonl").write_text("".join(rows))


def child(folder: str, way: str, grown: str) -> None:
    """Measure one partition and print [own size, peak, plan] in MB."""
    torch.set_num_threads(1)
    from headroom.checkpoints import load_tokenizer

    # What libraries load at their first use is the interpreter's: a pass of a tiny model.
    tiny = llama(TINY)
    plain_passes(tiny, [random_samples(2, 8, 256, 0)], 2)
    load_tokenizer(f"{folder}/model")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    settings = {
        "compute": {"device": "cpu", "dtype": "float32", "threads": 1},
        "gradients": OWN
        | {"batch": 5, "block": 20, "memory_gb": 0.2, "disk_gb": 0 if way == "tiled" else 20},
        "backend": "exact",
    }
    sets = {name: f"{folder}/{name}{grown}.jsonl" for name in ("originals", "queries")}
    outputs = {name: f"{folder}/{way}{grown}.{name}" for name in ("dots", "states")}
    arguments = (f"{folder}/model", sets, settings, (0, int(grown)), 0, Path(folder) / way / grown)
    measure.measure_part(*arguments, outputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    plan = prepare(*arguments).plan.memory / 1e6
    sizes = f"{20 * int(grown)}, {20 * int(grown)}"
    print(json.dumps([own, peak, plan, sizes]))


def throughput(settings: argparse.Namespace) -> None:
    """Print samples a second by backend."""
    size = BILLION if settings.device == "cuda" else TINY
    size = size._replace(count=settings.batch)
    capture = Capture(llama(size, device=settings.device))
    sides = [random_samples(size.count, size.length, size.vocabulary, seed) for seed in (1, 2)]
    print("\n| backend | parameters | N = M | T | samples/s |\n|---|---|---|---|---|")
    parameters = sum(p.numel() for p in capture.model.parameters())
    for backend in ("exact", "ghost", "two_sided"):
        choice = dict.fromkeys(capture.shapes, backend)
        setup = setup_of(capture, sides, choice, settings.batch)
        turns = [
            timed(settings.device, lambda setup=setup: measure.measure(setup))[0]
            for _ in range(settings.rounds + 1)
        ]
        speed = 2 * size.count / statistics.median(turns[1:])
        print(
            f"| {backend} | {parameters:,} | {size.count} | {size.length} | {speed:.3g} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--model", help="checkpoint for the part cost")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16, help="samples that pass at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        return child(*settings.child)
    os.environ.setdefault("TQDM_DISABLE", "1")
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    for part in settings.parts:
        globals()[part](settings)
    return None


if __name__ == "__main__":
    main()
