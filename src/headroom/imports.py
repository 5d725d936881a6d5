"""Bring models of others in: links to a folder's files, or a download from the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headroom.checkpoints import (
    INDEX,
    TOKENIZER_FILES,
    read_config,
    read_index,
    write_manifest,
)
from headroom.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICKLED = "pytorch_model.bin"
READ = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".spm")  # of a folder's files


def source_files(folder: str | Path) -> list[str]:
    """Return the files of a checkpoint folder that an import may read, sorted."""
    files = sorted(Path(folder).iterdir())
    return [str(file) for file in files if file.is_file() and file.suffix in READ]


MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")


def import_checkpoint(source: dict, name: str, output: Path) -> str | None:
    """Fill a folder with links to the files of a checkpoint on disk or on the hub.

    Links inside a real folder: sixteen gigabytes are not copied, and the folder is an artifact like
    any other.

    Args:
        source: ``path``, or ``hub`` and ``revision`` (HF_TOKEN and HF_HOME as everywhere).
        name: the checkpoint's name in the configuration, for messages.
        output: an empty folder.

    Returns:
        The commit that a hub's revision stood for; None of a folder.

    Raises:
        InputError: if it can't be fetched, lacks a shard, or holds no safetensors.
    """
    if "hub" in source:
        folder = fetch(source, f"checkpoints.{name}.hub", ("*.safetensors",))
    else:
        folder = Path(source["path"]).expanduser().resolve()
    # Of the weights only those that are read: repositories hold them a second time under other
    # names (consolidated.safetensors, model.fp16.safetensors).
    indexed = (folder / INDEX).is_file()
    shards = set(read_index(folder).values()) if indexed else {"model.safetensors"}
    wanted = {"config.json", "generation_config.json", *TOKENIZER_FILES, *shards}
    for file in sorted(folder.iterdir()):
        if file.name in wanted or (indexed and file.name == INDEX):
            (output / file.name).symlink_to(file.resolve())
    missing = sorted(shard for shard in shards if not (output / shard).is_file())
    if missing and indexed:
        raise InputError(f"config key checkpoints.{name}: {folder} lacks {', '.join(missing)}")
    if missing:
        raise InputError(
            f"config key checkpoints.{name}: {folder} holds no .safetensors to read (allowed: "
            f"model.safetensors, or shards with an index; pickled weights such as .bin can run "
            f"code and are not opened: save the model with safe_serialization)"
        )
    read_config(output)  # which families are served is each study's own matter
    write_manifest(output)
    return folder.name if "hub" in source else None  # a snapshot's folder is named by its commit


def import_translator(source: dict, name: str, output: Path) -> str | None:
    """Fill a folder with links to the files of a Marian and its tokenizer, on disk or on the hub.

    Published opus-mt models often hold pickled weights alone. Those are read with
    ``weights_only=True``, which runs no code, and written as safetensors.

    Args:
        source: ``path``, or ``hub`` and ``revision``.
        name: the translator's name in the configuration, for messages.
        output: an empty folder.

    Returns:
        The commit that a hub's revision stood for; None of a folder.

    Raises:
        InputError: if it can't be fetched, holds no weights or not all, or is no Marian.
    """
    key = f"translators.{name}"
    if "hub" in source:
        folder = fetch(source, f"{key}.hub", ("*.safetensors", PICKLED, "*.spm"))
    else:
        folder = Path(source["path"]).expanduser().resolve()
    _check_family(folder, key)
    pickled = not (folder / "model.safetensors").is_file()
    if pickled and not (folder / PICKLED).is_file():
        raise InputError(
            f"config key {key}: {folder} holds no weights (allowed: model.safetensors or {PICKLED})"
        )
    model = _loaded(folder, pickled, key)
    linked = (*MODEL_FILES, *TOKENIZER_FILES) if not pickled else TOKENIZER_FILES
    for file in sorted(folder.iterdir()):
        if file.name in linked:
            (output / file.name).symlink_to(file.resolve())
    if pickled:
        model.save_pretrained(output)
    write_manifest(output)
    return folder.name if "hub" in source else None


def _check_family(folder: Path, key: str) -> None:
    try:
        family = read_config(folder).get("model_type")
    except InputError as error:
        raise InputError(f"config key {key}: {error}") from None
    if family != "marian":
        raise InputError(
            f"config key {key}: model_type {family!r} is no translator that is served (allowed: "
            f"marian)"
        )


def _loaded(folder: Path, pickled: bool, key: str) -> "PreTrainedModel":
    """Read a Marian without running code; what its files lack would be drawn at random later."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from transformers import MarianMTModel

    try:
        model, found = MarianMTModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=not pickled,
            dtype=torch.float32,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        file = PICKLED if pickled else "model.safetensors"
        raise InputError(
            f"config key {key}: {folder / file} can't be read as tensors alone "
            f"({type(error).__name__}; allowed: a state dict, whole and without code)"
        ) from None
    if found["missing_keys"]:
        raise InputError(f"config key {key}: {folder} lacks {min(found['missing_keys'])}")
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise InputError(
            f"config key {key}: the weights of {folder} don't fit its config.json: {name} is "
            f"{list(stored)} (allowed: {list(wanted)})"
        )
    return model


def fetch(source: dict, key: str, weights: Sequence[str]) -> Path:
    """Download a model from the hub and return its folder.

    Args:
        source: ``hub`` and ``revision``.
        key: of the configuration, for messages.
        weights: patterns of weight files to fetch beside configuration and tokenizer.

    Raises:
        InputError: if it can't be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*weights, "*.json", "*.txt", "*.model", "*.jinja"]
    unread = ["consolidated*", "*/*"]  # the same weights again, in other layouts
    try:
        return Path(
            snapshot_download(
                source["hub"],
                revision=source["revision"],
                allow_patterns=wanted,
                ignore_patterns=unread,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"config key {key}: {source['hub']} can't be fetched ({reason}); is the id right, the "
            f"network there, and HF_TOKEN set where the model is gated?"
        ) from None
