"""The jobs of the branches study, from files to files."""

from collections.abc import Mapping
from pathlib import Path

import torch

from headroom.branches.batches import Draws, micro_batch
from headroom.branches.model import Stack
from headroom.branches.runs import DIVERGED, TRAINED, branch_range
from headroom.branches.runs import Stack as Planned
from headroom.branches.saved import save_run
from headroom.branches.stack import Members, adamw, sum_of_losses
from headroom.branches.texts import Texts, load_texts
from headroom.checkpoints import (
    POSITIONS,
    copy_tokenizer,
    resolve_device,
    write_json,
    write_manifest,
)
from headroom.errors import InputError
from headroom.language_model import special_tokens
from headroom.training import DivergedError, Plan, Progress, train, warmup_cosine

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def precision_of(name: str, device: str) -> torch.dtype:
    """Return the type that products are made in; ``auto`` is bfloat16 on a GPU."""
    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") else "float32"
    return PRECISIONS[name]


def train_stack(
    settings: Mapping,
    stack: Planned,
    texts: str,
    tokenizer: str,
    output: Path,
    state: Path,
    halvings: int = 0,
) -> None:
    """Train the members of a stack and write a folder for each, named by its run.

    One that diverged leaves ``run.json``, which says so, and no weights.

    Args:
        settings: of the job.
        stack: group and rotations.
        texts: folder of the training texts.
        tokenizer: folder of their tokenizer.
        output: an empty folder.
        state: folder of the training state.
        halvings: how often the micro-batch is halved from the start.
    """
    own = settings["branches"]
    torch.set_num_threads(own["train"]["threads"])
    device = resolve_device(settings["compute"]["device"])
    group, words = stack.group, special_tokens(Path(tokenizer))
    store = load_texts(texts)
    sizes = sizes_of(own, stack, vocabulary_of(tokenizer), int(store.lengths.max()))
    members = Members(Stack(sizes, stack.rotations, group.mask, group.seed)).to(device).train()
    try:
        progress = _fit(own, stack, members, store, device, state, halvings)
    except DivergedError as error:
        if not members.diverged.all():
            raise
        progress = error.progress
    except InputError as error:
        raise InputError(f"{error}: smaller branches.stack or branches.train.micro_texts") from None
    for place, run in enumerate(stack.runs):
        folder = output / run.name
        folder.mkdir()
        _write(folder, run.name, members, place, progress)
        if not members.diverged[place]:
            save_run(members.stack, place, folder, words)
            copy_tokenizer(tokenizer, folder)
    write_manifest(output)


def _write(folder: Path, name: str, members: Members, place: int, progress: Progress) -> None:
    """Write what became of a member, and its log."""
    ended = int(members.diverged[place])
    facts: dict = {"run": name, "status": DIVERGED if ended else TRAINED}
    facts["step"] = ended or progress.step
    if not ended:
        facts |= {"tokens": progress.tokens, "parameters": members.stack.parameters_of_one}
    write_json(folder / "training_log.json", _log(progress, place, ended))
    write_json(folder / "run.json", facts)


def sizes_of(own: Mapping, stack: Planned, vocabulary: int, longest: int) -> dict:
    """Return the sizes of a stack's members that read texts of so many tokens at most."""
    architecture = stack.group.architecture
    return {
        "vocabulary": vocabulary,
        "hidden": architecture.hidden,
        "heads": architecture.heads,
        "kv_heads": own["kv_heads"],
        "layers": own["layers"],
        "theta": own["theta"],
        "positions": max(POSITIONS, longest),
    }


def vocabulary_of(tokenizer: str) -> int:
    """Return how many tokens a tokenizer knows."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json")).get_vocab_size()


def _fit(
    own: Mapping,
    stack: Planned,
    members: Members,
    texts: Texts,
    device: str,
    state: Path,
    halvings: int,
) -> Progress:
    """Train the members in place on batches that depend on branches, seed and step alone."""
    wanted, group = own["train"], stack.group
    low, high = branch_range(group.train_branch)
    offsets = own["offsets"]["train"]
    draws = Draws(texts.lengths, (low, high), wanted["texts"], group.seed, offsets)
    plan = Plan(
        steps=wanted["steps"],
        micro_batch=micro_batch(wanted["micro_texts"], low, high),
        clip=wanted["clip"],
        halvings=halvings,
        seed=group.seed,
    )
    return train(
        members,
        adamw(members.stack, wanted["weight_decay"], wanted["learning_rate"]),
        warmup_cosine(wanted["steps"], wanted["warmup"]),
        lambda step: list(zip(*draws.step(step), strict=True)),
        sum_of_losses(texts, device, precision_of(wanted["precision"], device)),
        plan,
        state,
        clip=members.clip,
    )


def _log(progress: Progress, place: int, diverged: int) -> list[dict]:
    """Return a member's own training log, up to where it diverged."""
    rows = [
        {
            "step": row["step"],
            "loss": row[f"member{place}"],
            "learning_rate": row["learning_rate"],
            "tokens": row["tokens"],
        }
        for row in progress.log
    ]
    return [row for row in rows if not diverged or row["step"] < diverged]
