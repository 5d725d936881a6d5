"""Speed of stacked training: K runs as one beside the same runs one after another.

    python benchmarks/branches.py                                    the default's size on a CPU
    python benchmarks/branches.py --texts 32                         more tokens a step
    python benchmarks/branches.py --device cuda --hidden 512 --heads 8 --layers 8 --length 250
                                  --vocabulary 6400 --dtype bfloat16

Prints a Markdown table: tokens a second of K runs together (each token counts once a run), stacked,
one after another (stacks of one) and, on the same batches, transformers' Llama one after another.
What is compared takes turns in one run; medians of the rounds.

Floor of a step: 6 FLOPs a parameter and token beside attention. At the default's size (103,000
parameters beside 33,000 of the embedding, 128 tokens) that is 1e8 FLOPs or 2 ms a run on a core
of 50 GFLOP/s, while some 300 kernels a step cost about 5 µs each whatever they compute: stacking
can save at most those of the runs beside the first.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from torch import nn

from headroom.branches.batches import Draws, micro_batch
from headroom.branches.layout import columns
from headroom.branches.model import Stack, inputs
from headroom.branches.runs import Rotation
from headroom.branches.stack import Members, adamw, sum_of_losses
from headroom.branches.texts import Texts

BRANCHES = (1, 7)


def random_texts(settings: argparse.Namespace) -> Texts:
    """Texts of one length: speed does not hang on what stands in them."""
    count = 4096
    starts = np.arange(count + 1) * settings.length
    draw = np.random.default_rng(0)
    tokens = draw.integers(settings.vocabulary, size=starts[-1]).astype(np.uint16)
    return Texts(tokens, starts, np.arange(count))


def stack_of(settings: argparse.Namespace, members: int) -> Members:
    """A stack of runs from ratio 0 to 1."""
    sizes = {
        "vocabulary": settings.vocabulary,
        "hidden": settings.hidden,
        "heads": settings.heads,
        "kv_heads": 2,
        "layers": settings.layers,
        "theta": 1e6,
        "positions": 512,
    }
    ratios = np.linspace(0, 1, members) if members > 1 else [0.5]
    rotations = [Rotation(float(ratio)) for ratio in ratios]
    return Members(Stack(sizes, rotations)).to(settings.device)


def trainer(settings: argparse.Namespace, texts: Texts, members: int) -> Callable[[list], None]:
    """A function that trains a stack for the given steps."""
    stack = stack_of(settings, members)
    optimizer = adamw(stack.stack, 0.01, 1e-3)
    loss_sum = sum_of_losses(texts, settings.device, getattr(torch, settings.dtype))
    portion = micro_batch(settings.micro_texts, *BRANCHES)

    def train(steps: list) -> None:
        for samples in steps:
            count = 0
            for start in range(0, len(samples), portion):
                loss, valid, _ = loss_sum(stack, samples[start : start + portion])
                loss.backward()
                count += valid
            torch._foreach_div_([p.grad for p in stack.stack.parameters()], float(count))
            stack.clip(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


def llama(settings: argparse.Namespace, texts: Texts) -> Callable[[list], None]:
    """A function that trains transformers' Llama on the same batches, masks given to it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = settings.hidden
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=size,
        intermediate_size=stack_of(settings, 1).stack.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    portion = micro_batch(settings.micro_texts, *BRANCHES)
    precision = getattr(torch, settings.dtype)

    def train(steps: list) -> None:
        for samples in steps:
            for start in range(0, len(samples), portion):
                batch = columns(texts, *zip(*samples[start : start + portion], strict=True))
                found = inputs(batch, settings.device)
                earlier = found.time_BS[:, None, :] < found.time_BS[:, :, None]
                earlier &= found.valid_BS[:, None, :] & found.valid_BS[:, :, None]
                earlier.diagonal(dim1=1, dim2=2).fill_(True)
                with torch.autocast(settings.device, precision, precision != torch.float32):
                    logits = model(
                        input_ids=found.tokens_BS,
                        attention_mask=earlier[:, None],
                        position_ids=found.flat_BS,
                        use_cache=False,
                    ).logits
                nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), found.labels_BS.flatten(), reduction="sum"
                ).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


def seconds(settings: argparse.Namespace, train: Callable, steps: list, times: int = 1) -> float:
    """Seconds for training on the steps, so many times over."""
    started = time.perf_counter()
    for _ in range(times):
        train(steps)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(settings: argparse.Namespace, members: int) -> str:
    """A row of the table."""
    texts = random_texts(settings)
    draws = Draws(texts.lengths, BRANCHES, settings.texts, 0, True)
    steps = [list(zip(*draws.step(n), strict=True)) for n in range(settings.steps)]
    tokens = sum((len(texts.lengths[s]) * settings.length) for step in steps for s, _ in step)
    stacked, alone = trainer(settings, texts, members), trainer(settings, texts, 1)
    plain = llama(settings, texts)
    found: dict[str, list[float]] = {"stacked": [], "serial": [], "llama": []}
    for turn in range(settings.rounds + 1):
        taken = (
            seconds(settings, stacked, steps),
            seconds(settings, alone, steps, members),
            seconds(settings, plain, steps, members),
        )
        if turn:  # the first one warms up
            for name, value in zip(found, taken, strict=True):
                found[name].append(value)
    middle = {name: statistics.median(values) for name, values in found.items()}
    speeds = " | ".join(f"{members * tokens / value:,.0f}" for value in middle.values())
    ratios = [
        statistics.median(a / b for a, b in zip(found[name], found["stacked"], strict=True))
        for name in ("serial", "llama")
    ]
    return f"| {members} | {speeds} | {ratios[0]:.2f} | {ratios[1]:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, default in (
        ("hidden", 64),
        ("heads", 4),
        ("layers", 2),
        ("vocabulary", 512),
        ("length", 16),
        ("texts", 8),
        ("micro_texts", 8),
        ("steps", 30),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 6, 18])
    settings = parser.parse_args()
    torch.set_num_threads(1)
    print("| runs | stacked, tokens/s | one after another | transformers | ratio | ratio |")
    print("|---|---|---|---|---|---|")
    for members in settings.members:
        print(measure(settings, members), flush=True)


if __name__ == "__main__":
    main()
