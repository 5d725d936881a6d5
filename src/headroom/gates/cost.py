"""What a translation model costs: FLOPs of a sentence, time to generate."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headroom.errors import InputError
from headroom.evaluation.cost import wait
from headroom.progress import progress

if TYPE_CHECKING:
    from transformers import MarianMTModel


@torch.no_grad()
def flops(model: "MarianMTModel", source: int, target: int) -> int:
    """Return the forward FLOPs of one sentence pair, teacher-forced and without a cache.

    2 per multiply-add of every matrix product, masked scores included: for one head of encoder
    self attention 8 S D d + 4 S² d; biases, norms and softmax are left out.

    Args:
        model: a Marian, with or without all its heads.
        source: source tokens S.
        target: target tokens T.
    """
    from torch.utils.flop_counter import FlopCounterMode

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # fused kernels are not counted on every device
    try:
        with FlopCounterMode(display=False) as counter:
            model(
                input_ids=_tokens(model, 1, source),
                attention_mask=torch.ones(1, source, dtype=torch.long, device=model.device),
                decoder_input_ids=_tokens(model, 1, target),
                use_cache=False,
            )
    finally:
        model.set_attn_implementation(before)
    return counter.get_total_flops()


def latency(
    models: Mapping[str, "MarianMTModel"],
    batch_sizes: Sequence[int],
    source: int,
    new_tokens: int,
    runs: int,
    threads: int,
) -> list[dict]:
    """Measure greedy generation with a cache, encoder included: milliseconds a batch.

    All models are in memory together and take turns, so that what else the machine does meets all
    of them alike; the first round of each batch size warms up.

    Args:
        models: by name, in evaluation mode.
        batch_sizes: sentences at once.
        source: tokens of each source sentence.
        new_tokens: tokens that are generated for each, no fewer and no more.
        runs: timed runs a model and batch size.
        threads: of the CPU.

    Returns:
        For each model and batch size: name, batch, median, low and high (quartiles, ms), runs.

    Raises:
        InputError: for fewer than 2 runs, or more tokens than a model has positions for.
    """
    if runs < 2:
        raise InputError(f"latency runs: {runs} (allowed: at least 2, for quartiles)")
    for name, model in models.items():
        positions = model.config.max_position_embeddings
        if max(source, new_tokens) > positions:
            raise InputError(
                f"latency of {name}: {source} source and {new_tokens} new tokens (allowed: at "
                f"most {positions} of each)"
            )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [
            row
            for batch in batch_sizes
            for row in _take_turns(models, batch, source, new_tokens, runs)
        ]
    finally:
        torch.set_num_threads(before)


def _take_turns(
    models: Mapping[str, "MarianMTModel"], batch: int, source: int, new_tokens: int, runs: int
) -> list[dict]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for run in progress(range(runs + 1), f"decoding, batch {batch}", unit="run"):
        for name, model in models.items():
            seconds = _generate(model, _tokens(model, batch, source), new_tokens)
            if run:  # the first one warms up
                times[name].append(1000 * seconds)
    rows = []
    for name, found in times.items():
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        quartiles = {"median": median, "low": low, "high": high}
        rows.append({"name": name, "batch": batch, **quartiles, "runs": len(found)})
    return rows


@torch.no_grad()
def _generate(model: "MarianMTModel", input_BS: Tensor, new_tokens: int) -> float:
    """Seconds to generate exactly so many tokens for each sentence."""
    wait(model)
    started = time.perf_counter()
    output_BT = model.generate(
        input_ids=input_BS,
        attention_mask=torch.ones_like(input_BS),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        num_beams=1,
        do_sample=False,
        use_cache=True,
    )
    wait(model)
    seconds = time.perf_counter() - started
    if output_BT.shape[1] != 1 + new_tokens:
        raise RuntimeError(f"{output_BT.shape[1] - 1} tokens generated instead of {new_tokens}")
    return seconds


def _tokens(model: "MarianMTModel", batch: int, length: int) -> Tensor:
    """Return sentences of one ordinary token: which one makes no difference to the cost."""
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {config.pad_token_id, config.decoder_start_token_id, *ends}
    ordinary = next(token for token in range(config.vocab_size) if token not in special)
    return torch.full((batch, length), ordinary, dtype=torch.long, device=model.device)
