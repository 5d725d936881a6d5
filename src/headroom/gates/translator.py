"""Translators: a Marian trained from scratch, or a published one brought in; their training loss.

B pairs, S source and T target tokens, V the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from headroom.checkpoints import POSITIONS, copy_tokenizer, write_manifest
from headroom.corpora.pair_tokens import SPECIALS, Batches, PairTokens, collate
from headroom.gates.reports import Reporter
from headroom.training import Plan, Progress, Schedule, constant, inverse_sqrt, noam, train

PAD, END, _ = range(len(SPECIALS))  # as the joint tokenizer numbers them
ADAM = {"betas": (0.9, 0.98), "eps": 1e-9}  # Vaswani et al. 2017


def build(settings: Mapping, longest: int, seed: int) -> nn.Module:
    """Return a Marian encoder-decoder with random weights.

    Args:
        settings: ``translators.X.train`` of the configuration.
        longest: tokens of the longest sentence that is trained on or generated.
        seed: of the weights.
    """
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=settings["vocabulary"],
        d_model=settings["hidden"],
        encoder_layers=settings["layers"],
        decoder_layers=settings["layers"],
        encoder_attention_heads=settings["heads"],
        decoder_attention_heads=settings["heads"],
        encoder_ffn_dim=settings["ffn"],
        decoder_ffn_dim=settings["ffn"],
        dropout=settings["dropout"],
        activation_function="relu",
        max_position_embeddings=max(POSITIONS, longest),  # sinusoids, which cost nothing
        scale_embedding=True,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        forced_eos_token_id=END,
        dtype="float32",
    )
    model = MarianMTModel(config)
    model.generation_config.bad_words_ids = [[PAD]]
    model.generation_config.max_length = longest
    return model


def pair_loss(pairs: PairTokens, pad: int, smoothing: float) -> Callable:
    """Return the training loss of a translator as a function of it and of pair numbers.

    Σ over target tokens of (1 − ε) · nll + ε · mean_v(−ln p_v), the label-smoothed cross-entropy;
    ``nll`` in the third item is the plain one. Nats.
    """

    def loss_sum(model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, int, dict]:
        batch = collate(pairs, indices, pad, model.device)
        labels_BT = batch["labels"]
        logits_BTV = model(**_inputs(model, batch), use_cache=False).logits
        valid_BT = labels_BT >= 0
        log_p_NV = logits_BTV[valid_BT].float().log_softmax(-1)
        nll = -log_p_NV.gather(1, labels_BT[valid_BT][:, None]).sum()
        loss = nll if not smoothing else (1 - smoothing) * nll - smoothing * log_p_NV.mean(1).sum()
        return loss, int(valid_BT.sum()), {"nll": float(nll.detach())}

    return loss_sum


def _inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder reads is the target one step later, so that no loss is computed twice."""
    labels_BT = batch["labels"]
    config = model.config
    started_BT = labels_BT.new_full(labels_BT.shape, config.decoder_start_token_id)
    started_BT[:, 1:] = labels_BT[:, :-1].masked_fill(labels_BT[:, :-1] < 0, config.pad_token_id)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": started_BT,
    }


def schedule_of(settings: Mapping, width: int) -> Schedule:
    """Return the learning rate's factor by step: ``inverse_sqrt``, ``noam`` or ``constant``."""
    kinds = {
        "inverse_sqrt": lambda: inverse_sqrt(settings["warmup"]),
        "noam": lambda: noam(width, settings["warmup"], settings["noam_step_factor"]),
        "constant": lambda: constant,
    }
    return kinds[settings["schedule"]]()


def fit(
    model: nn.Module,
    settings: Mapping,
    pairs: PairTokens,
    state: Path,
    reporter: Reporter | None = None,
    halvings: int = 0,
) -> Progress:
    """Train a translator's weights in place; leaves it in evaluation mode.

    Args:
        model: a Marian on its device.
        settings: ``translators.X.train`` of the configuration.
        pairs: the training pairs' tokens.
        state: folder of the training state.
        reporter: translates held-out sentences on the way.
        halvings: how often micro-batches are halved from the start.
    """
    torch.set_num_threads(settings["threads"])
    batches = Batches(pairs, settings["batch_tokens"], settings["seed"])
    every = settings["report"] or batches.steps_per_epoch
    progress = train(
        model.train(),
        torch.optim.Adam(model.parameters(), lr=settings["learning_rate"], **ADAM),
        schedule_of(settings, settings["hidden"]),
        batches,
        pair_loss(pairs, model.config.pad_token_id, settings["smoothing"]),
        Plan(steps=settings["steps"], halvings=halvings, seed=settings["seed"]),
        state,
        reporter and reporter.watch(model, batches, every, settings["steps"]),
    )
    model.eval()
    return progress


def save_translator(model: nn.Module, tokenizer: str | Path, output: Path) -> None:
    """Write a stock checkpoint with its tokenizer and manifest into an empty folder."""
    model.save_pretrained(output)
    copy_tokenizer(tokenizer, output)
    write_manifest(output)
