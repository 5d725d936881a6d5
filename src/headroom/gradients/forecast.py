"""The plan of a whole measurement before a weight is loaded: all partitions together."""

from collections.abc import Mapping
from pathlib import Path

import torch

from headroom.checkpoints import load_tokenizer, write_json
from headroom.gradients.capture import Capture
from headroom.gradients.encoding import encode
from headroom.gradients.grid import partition
from headroom.gradients.setup import choice_of, plan_part, side_of
from headroom.gradients.similarity import Measurer


def write_plan(checkpoint: str, sets: Mapping[str, str], settings: Mapping, output: str) -> None:
    """Write passes, FLOPs, memory and disk of a measurement, and which backend each layer gets.

    Args:
        checkpoint: folder of the model; its weights are not read.
        sets: files of the ``originals`` and the ``queries``.
        settings: sections ``compute`` and ``gradients``, and ``backend``.
        output: the JSON file.

    Raises:
        InputError: for samples and sizes that can't be measured.
    """
    own = settings["gradients"]
    tokenizer = load_tokenizer(checkpoint)
    originals, queries = (
        side_of(encode(sets[name], tokenizer, own), own) for name in ("originals", "queries")
    )
    capture = Capture(_shapes_only(checkpoint, settings["compute"]["dtype"]))
    choice = choice_of(settings["backend"], capture, originals, own)
    measurer = Measurer(capture, choice, own, own["batch"])
    count = own["partitions"]
    parts = [partition(originals.grid.blocks, number, count) for number in range(count)]
    plans = [plan_part(originals, queries, measurer, part, own) for part in parts if part]
    first = plans[0]
    for line in (f"{len(plans)} partitions with originals of {count}", first.said()):
        print(line, flush=True)
    extra = (len(plans) - 1) * len(queries.encoded.ids) if first.stored else 0
    one_pass = first.pass_flops
    found = {
        "stored": first.stored,
        "originals": len(originals.encoded.ids),
        "queries": len(queries.encoded.ids),
        "tokens": sum(originals.encoded.lengths) + sum(queries.encoded.lengths),
        "longest": max(*originals.encoded.lengths, *queries.encoded.lengths),
        "partitions": len(plans),
        # Stored features of the queries are made once for all partitions.
        "passes": sum(plan.passes for plan in plans) - extra,
        "teraflop": round((sum(plan.flops for plan in plans) - extra * one_pass) / 1e12, 6),
        "memory_needed_gb": round(max(plan.memory for plan in plans) / 1e9, 6),
        "disk_needed_gb": round(first.disk / 1e9, 6),
        "groups_of_layers": 1 if first.stored else len(first.groups),
        "blocks_of_a_tile": first.tile,
        "choice": choice,
        "skipped": {"originals": originals.encoded.skips, "queries": queries.encoded.skips},
    }
    write_json(Path(output), found)


def _shapes_only(checkpoint: str, dtype: str):
    """Return the model without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=wanted)
