"""Train a small Llama from scratch on a token stream: the base checkpoint of offline runs."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headroom.checkpoints import (
    POSITIONS,
    copy_tokenizer,
    resolve_device,
    write_json,
    write_manifest,
)
from headroom.corpora.tokens import load_stream, windows
from headroom.training import Plan, train, warmup_cosine


def build(settings: Mapping, special: Mapping[str, int]) -> torch.nn.Module:
    """Return a Llama with random weights of the given sizes and seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings["seed"])
    config = LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["ffn"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["groups"],
        head_dim=settings["hidden"] // settings["heads"],
        max_position_embeddings=max(POSITIONS, settings["window"]),
        tie_word_embeddings=True,
        dtype="float32",
        **special,
    )
    return LlamaForCausalLM(config)


def loss_sum(model: torch.nn.Module, samples: Tensor) -> tuple[Tensor, int]:
    """Return the sum of next-token nll of windows (B, T) and the number of predicted tokens."""
    logits_BTV = model(input_ids=samples, use_cache=False).logits[:, :-1]
    targets_BT = samples[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum"
    )
    return loss, targets_BT.numel()


def order(count: int, batch: int, seed: int):
    """Return a function from a step to the windows it reads: a new permutation each epoch."""

    @functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    def chosen(step: int) -> np.ndarray:
        places = range(step * batch, (step + 1) * batch)
        return np.array([permutation(place // count)[place % count] for place in places])

    return chosen


def adamw(model: torch.nn.Module, settings: Mapping) -> torch.optim.AdamW:
    """Return AdamW (.9, .95) that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=(0.9, 0.95), fused=True)


def train_language_model(
    settings: Mapping,
    device: str,
    tokens: str,
    tokenizer: str,
    output: Path,
    state: Path,
    halvings: int = 0,
) -> None:
    """Train a Llama and write it as a stock checkpoint with its tokenizer and training log.

    Args:
        settings: ``checkpoints.X.train`` of the configuration.
        device: ``auto``, ``cpu`` or ``cuda``.
        tokens: token stream of the training split.
        tokenizer: folder of its tokenizer.
        output: an empty folder.
        state: folder of the training state.
        halvings: how often the micro-batch is halved from the start.
    """
    torch.set_num_threads(settings["threads"])
    samples = torch.from_numpy(windows(load_stream(tokens), settings["window"])[0])
    device = resolve_device(device)
    model = build(settings, special_tokens(Path(tokenizer))).to(device).train()
    optimizer = adamw(model, settings)
    steps = max(1, round(settings["tokens"] / (settings["batch"] * settings["window"])))
    chosen = order(len(samples), settings["batch"], settings["seed"])

    def batches(step: int) -> Sequence:
        return samples[chosen(step)].to(device)

    plan = Plan(steps=steps, micro_batch=settings["batch"], halvings=halvings)
    schedule = warmup_cosine(steps, settings["warmup"])
    log = train(model, optimizer, schedule, batches, loss_sum, plan, state).log
    model.eval().save_pretrained(output)
    copy_tokenizer(tokenizer, output)
    write_json(output / "training_log.json", log)
    write_manifest(output)


def special_tokens(tokenizer: Path) -> dict[str, int]:
    """Return the numbers of a trained tokenizer's special tokens under a config's names."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    names = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    return {key: vocabulary.token_to_id(token) for key, token in names.items()}
