"""What a checkpoint costs: parameters, bytes, key/value cache, FLOPs, decoding speed."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headroom.checkpoints import Overlay, Tensors, geometry, load_model, read_config, resolve_device
from headroom.progress import progress

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def sizes(checkpoint: str | Path, window: int) -> dict:
    """Return a checkpoint's sizes: counts of parameters, bytes, FLOPs a token.

    FLOPs a token = 2 · (matrix parameters and the output head) + 2 · L · H · d · T, the second part
    for scores and values at T/2 keys, the average over a context of T tokens. Bytes of the
    key/value cache a token = 2 · L · G · d · bytes of a number as the checkpoint stores it.

    Args:
        checkpoint: its folder.
        window: context length T that FLOPs are stated at.
    """
    tensors, config = Tensors(checkpoint), read_config(checkpoint)
    shape = geometry(config)
    counts = dict.fromkeys(("embedding", "attention", "ffn", "other"), 0)
    for name, count in tensors.counts().items():
        counts[_part(name)] += count
    total = sum(counts.values())
    tied = config.get("tie_word_embeddings", False) and "lm_head.weight" not in tensors
    table = shape.vocabulary * shape.hidden
    multiplied = counts["attention"] + counts["ffn"] + table
    files = [tensors.folder / shard for shard in set(tensors.shards.values())]
    dtype = tensors.shapes()["model.layers.0.self_attn.k_proj.weight"][1]
    attended = shape.layers * shape.heads * shape.head_dim * window
    return {
        "parameters": total,
        **{f"{name}_parameters": count for name, count in counts.items()},
        "effective_parameters": effective_parameters(tensors, config),
        "embeddings_tied": bool(tied),
        "checkpoint_bytes": sum(file.stat().st_size for file in files),
        "kv_cache_bytes_per_token": 2 * shape.layers * shape.groups * shape.head_dim * BYTES[dtype],
        "flops_per_token": 2 * multiplied + 2 * attended,
        "flops_window": window,
    }


def _part(name: str) -> str:
    if "embed_tokens" in name or "lm_head" in name:
        return "embedding"
    if "self_attn" in name:
        return "attention"
    return "ffn" if ".mlp." in name else "other"


def effective_parameters(tensors: Mapping[str, Tensor], config: dict) -> int:
    """Count parameters without those that do nothing or only repeat.

    A query head whose block of W_O is zero does nothing; live heads with equal W_Q, W_K, W_V count
    once; a key/value head that no live head reads does nothing, equal ones count once. An FFN
    channel whose column of W_d or whose row of W_u (and its bias) is zero does nothing. This is
    what deleting them would leave, also where a stock shape keeps them.

    Args:
        tensors: a checkpoint's, by name (``Tensors`` or a mapping).
        config: its ``config.json``.
    """
    shape = geometry(config)
    known = isinstance(tensors, Tensors | Overlay)  # those whose sizes need no reading
    counts = tensors.counts() if known else {name: tensors[name].numel() for name in tensors}
    other = sum(count for name, count in counts.items() if "self_attn" not in name)
    layers = range(shape.layers)
    heads = sum(_effective_layer(tensors, shape, layer) for layer in layers)
    return other + heads - sum(_idle_channels(tensors, layer) for layer in layers)


def _idle_channels(tensors, layer: int) -> int:
    """Count the parameters of the FFN channels of a layer that do nothing."""
    prefix = f"model.layers.{layer}.mlp."
    up_nD, down_Dn = (tensors[f"{prefix}{name}_proj.weight"] for name in ("up", "down"))
    biases = [f"{prefix}{name}_proj.bias" for name in ("gate", "up")]
    heard_n = up_nD.any(1)
    if biases[1] in tensors:
        heard_n = heard_n | (tensors[biases[1]] != 0)
    idle = int((~(heard_n & down_Dn.any(0))).sum())
    return idle * (3 * up_nD.shape[1] + sum(name in tensors for name in biases))


def _effective_layer(tensors, shape, layer: int) -> int:
    prefix = f"model.layers.{layer}.self_attn."
    rows = {}
    for name, heads in zip(PROJECTIONS[:3], (shape.heads, shape.groups, shape.groups), strict=True):
        part = tensors[f"{prefix}{name}.weight"].reshape(heads, -1)
        if f"{prefix}{name}.bias" in tensors:
            part = torch.cat([part, tensors[f"{prefix}{name}.bias"].reshape(heads, -1)], dim=1)
        rows[name] = part
    output = tensors[f"{prefix}o_proj.weight"].reshape(shape.hidden, shape.heads, shape.head_dim)
    group_of = _classes(torch.cat([rows["k_proj"], rows["v_proj"]], dim=1))
    query_of = _classes(rows["q_proj"])
    live = [h for h in range(shape.heads) if bool(output[:, h].any())]
    groups = {group_of[h // shape.heads_per_group] for h in live}
    heads = {(query_of[h], group_of[h // shape.heads_per_group]) for h in live}
    each_head = rows["q_proj"].shape[1] + shape.hidden * shape.head_dim
    each_group = rows["k_proj"].shape[1] + rows["v_proj"].shape[1]
    rest = sum(
        tensors[name].numel()
        for suffix in ("o_proj.bias", "q_norm.weight", "k_norm.weight")
        if (name := prefix + suffix) in tensors
    )
    return len(heads) * each_head + len(groups) * each_group + rest


def _classes(rows: Tensor) -> list[int]:
    """Number equal rows equally."""
    seen: dict[bytes, int] = {}
    flat = rows.detach().cpu().contiguous().view(torch.uint8)
    return [seen.setdefault(flat[i].numpy().tobytes(), i) for i in range(len(rows))]


def decode_latency(checkpoints: Sequence[str], settings: Mapping) -> list[dict]:
    """Measure greedy decoding with a cache, alternating over checkpoints: milliseconds a token.

    All models are in memory together and take turns, so that what else the machine does meets all
    of them alike.

    Args:
        checkpoints: folders.
        settings: ``compute`` and ``evaluation.latency`` of the configuration.

    Returns:
        For each: name, median, low and high (quartiles), parameters of the shape, runs.
    """
    compute, wanted = settings["compute"], settings["evaluation"]["latency"]
    torch.set_num_threads(compute["threads"])
    models = [load_model(path, compute["device"], compute["dtype"]) for path in checkpoints]
    times: list[list[float]] = [[] for _ in models]
    for run in progress(range(wanted["runs"] + 1), "decoding", unit="run"):
        for model, found in zip(models, times, strict=True):
            seconds = _decode(model, wanted)
            if run:  # the first one warms up
                found.append(1000 * seconds / wanted["new_tokens"])
    rows = []
    for path, model, found in zip(checkpoints, models, times, strict=True):
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        config = model.config
        rows.append(
            {
                "name": Path(path).name,
                "median": median,
                "low": low,
                "high": high,
                "runs": len(found),
                "heads": config.num_attention_heads,
                "key_value_heads": config.num_key_value_heads,
            }
        )
    return rows


@torch.no_grad()
def _decode(model, wanted: Mapping) -> float:
    """Seconds for ``new_tokens`` greedy steps after a prompt that is already in the cache."""
    prompt = torch.ones(wanted["batch"], wanted["prompt"], dtype=torch.long, device=model.device)
    state = model(input_ids=prompt, use_cache=True)
    wait(model)
    started = time.perf_counter()
    for _ in range(wanted["new_tokens"]):
        token = state.logits[:, -1:].argmax(-1)
        state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True)
    wait(model)
    return time.perf_counter() - started


def wait(model) -> None:
    """Wait until the GPU has done what was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def describe_latency(settings: Mapping) -> str:
    """Return in words how decoding was timed."""
    wanted, compute = settings["evaluation"]["latency"], settings["compute"]
    return (
        f"prompt of {wanted['prompt']} tokens, batch {wanted['batch']}, {wanted['runs']} runs, "
        f"{resolve_device(compute['device'])}, {compute['dtype']}, "
        f"{compute['threads']} thread" + ("s" if compute["threads"] > 1 else "")
    )
