"""Bring models of others in: links to a folder's files, or a download from the hub."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headroom.checkpoints import (
    INDEX,
    TOKENIZER_FILES,
    read_config,
    read_index,
    read_object,
    write_manifest,
)
from headroom.errors import InputError
from headroom.progress import Lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = f"{PICKLED}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MODEL_FILES = ("config.json", "generation_config.json")
READ = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".spm")  # of a folder's files


def source_files(folder: str | Path) -> list[str]:
    """Return the files of a checkpoint folder that an import may read, sorted."""
    files = sorted(Path(folder).iterdir())
    return [str(file) for file in files if file.is_file() and file.suffix in READ]


def check_folder(folder: Path, source: dict | None, key: str) -> None:
    """Refuse a model that wants code run: its own, or what pickled weights can hold; light.

    Args:
        folder: of a model and its tokenizer.
        source: ``pickle``, whether pickled weights are read (as tensors alone); None: never.
        key: of the configuration, for messages.

    Raises:
        InputError: naming the file and the key.
    """
    for path in sorted(folder.glob("*config.json")):
        try:
            code = _code_of(json.loads(path.read_text()))
        except (ValueError, RecursionError):
            raise InputError(f"config key {key}: {path} is no JSON (allowed: an object)") from None
        if code:
            raise InputError(
                f"config key {key}: {path} has {code}, code of its own that is never run (allowed: "
                f"models and tokenizers that transformers holds itself)"
            )
    if _holds(folder, INDEX, WEIGHTS) or (source or {}).get("pickle", False):
        return
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickled:
        asked = f"; or {key}.pickle: true, which reads {PICKLED} as tensors alone"
        raise InputError(
            f"config key {key}: {folder} holds no .safetensors to read but pickled weights "
            f"({pickled[0]}), which can run code (allowed: {WEIGHTS}, or shards with an index"
            f"{'' if source is None else asked})"
        )


def _code_of(found: object) -> str:
    """The entry of a configuration that names code: a class in a file, or a kernel of the hub."""
    if isinstance(found, list):
        return next(filter(None, map(_code_of, found)), "")
    if not isinstance(found, dict):
        return ""
    for name in ("auto_map", "custom_pipelines"):
        if found.get(name):
            return name
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(found.get(name)):
            return name
    return next(filter(None, map(_code_of, found.values())), "")


def _holds(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def import_checkpoint(source: dict, name: str, output: Path) -> str | None:
    """Fill a folder with links to the files of a checkpoint on disk or on the hub.

    Links inside a real folder: sixteen gigabytes are not copied, and the folder is an artifact like
    any other. Pickled weights, where they are asked for, are written as safetensors.

    Args:
        source: ``path``, or ``hub`` and ``revision`` (HF_TOKEN and HF_HOME as everywhere); and
            ``pickle``.
        name: the checkpoint's name in the configuration, for messages.
        output: an empty folder.

    Returns:
        The commit that a hub's revision stood for; None of a folder.

    Raises:
        InputError: if it can't be fetched, lacks a shard, wants code run, or holds no weights.
    """
    key = f"checkpoints.{name}"
    folder = _folder(source, key)
    read_config(folder)  # which families are served is each study's own matter
    shards, pickled = _weights(folder, source, key)
    _link(folder, shards, pickled, output)
    if pickled:
        _loaded(folder, shards, key, "AutoModelForCausalLM", "auto").save_pretrained(output)
    write_manifest(output)
    return folder.name if "hub" in source else None  # a snapshot's folder is named by its commit


def import_translator(source: dict, name: str, output: Path) -> str | None:
    """Fill a folder with links to the files of a Marian and its tokenizer, on disk or on the hub.

    Published opus-mt models often hold pickled weights alone. Those are read where it is asked for,
    with ``weights_only=True``, which runs no code, and written as safetensors.

    Args:
        source: ``path``, or ``hub`` and ``revision``; and ``pickle``.
        name: the translator's name in the configuration, for messages.
        output: an empty folder.

    Returns:
        The commit that a hub's revision stood for; None of a folder.

    Raises:
        InputError: if it can't be fetched, holds no weights or not all, wants code run, or is no
            Marian.
    """
    key = f"translators.{name}"
    folder = _folder(source, key, "*.spm")
    _check_family(folder, key)
    shards, pickled = _weights(folder, source, key)
    model = _loaded(folder, shards if pickled else [], key, "MarianMTModel", "float32")
    if pickled:
        model.save_pretrained(output)
    _link(folder, shards, pickled, output)
    write_manifest(output)
    return folder.name if "hub" in source else None


def _folder(source: dict, key: str, *more: str) -> Path:
    """Where a model lies, fetched from the hub if need be, once it is known to want no code run."""
    if "hub" in source:
        weights = ("*.safetensors", *(("pytorch_model*.bin",) if source.get("pickle") else ()))
        folder = fetch(source, f"{key}.hub", (*weights, *more))
    else:
        folder = Path(source["path"]).expanduser().resolve()
    check_folder(folder, source, key)
    return folder


def _link(folder: Path, shards: Sequence[str], pickled: bool, output: Path) -> None:
    # Of the weights only those that are read: repositories hold them a second time under other
    # names (consolidated.safetensors, model.fp16.safetensors).
    model = () if pickled else (*MODEL_FILES, *shards, *((INDEX,) if shards != [WEIGHTS] else ()))
    for file in sorted(folder.iterdir()):
        if file.name in (*model, *TOKENIZER_FILES):
            (output / file.name).symlink_to(file.resolve())


def _weights(folder: Path, source: dict, key: str) -> tuple[list[str], bool]:
    """Return the files of the weights and whether they are pickled; safetensors go first."""
    pickled = not _holds(folder, INDEX, WEIGHTS) and source.get("pickle", False)
    index, single = (PICKLED_INDEX, PICKLED) if pickled else (INDEX, WEIGHTS)
    indexed = _holds(folder, index)  # then a single file beside it is not read
    ending = Path(single).suffix
    shards = sorted(set(read_index(folder, index, ending).values())) if indexed else [single]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing and indexed:
        raise InputError(f"config key {key}: {folder} lacks {', '.join(missing)}")
    if indexed and not isinstance(read_object(folder / index).get("metadata"), dict):
        raise InputError(f"config key {key}: {folder / index} has no metadata (allowed: an object)")
    if missing:
        raise InputError(
            f"config key {key}: {folder} holds no weights that are read (allowed: {WEIGHTS}, or "
            f"shards with an index; with {key}.pickle: true also {PICKLED})"
        )
    return shards, pickled


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


def _loaded(
    folder: Path, pickled: Sequence[str], key: str, kind: str, dtype: str
) -> "PreTrainedModel":
    """Read a model without running code; what its files lack would be drawn at random later."""
    import transformers
    from safetensors import SafetensorError

    for shard in pickled:
        _check_pickle(folder / shard, key)
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=not pickled,
            dtype=dtype,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"config key {key}: {folder / (pickled or [WEIGHTS])[0]} can't be read as tensors "
            f"alone ({type(error).__name__}; allowed: a state dict, whole and without code)"
        ) from None
    except ValueError as error:  # an architecture that transformers doesn't hold
        raise InputError(f"config key {key}: {folder}: {str(error).splitlines()[0]}") from None
    if found["missing_keys"]:
        raise InputError(f"config key {key}: {folder} lacks {min(found['missing_keys'])}")
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise InputError(
            f"config key {key}: the weights of {folder} don't fit its config.json: {name} is "
            f"{list(stored)} (allowed: {list(wanted)})"
        )
    return model


def _check_pickle(path: Path, key: str) -> None:
    """Refuse a pickle that is no state dict; what is more than tensors is never unpickled."""
    import torch

    reason, state = "no state dict", None
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = type(error).__name__
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise InputError(
            f"config key {key}: {path} can't be read as tensors alone ({reason}; allowed: a state "
            f"dict, whole and without code)"
        )


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
                tqdm_class=Lines,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"config key {key}: {source['hub']} can't be fetched ({reason}); is the id right, the "
            f"network there, and HF_TOKEN set where the model is gated?"
        ) from None
