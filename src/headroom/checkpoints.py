"""Load and save transformers checkpoints: geometry, lazy tensors, derived copies, manifests.

Heavy imports (torch, transformers) happen inside the functions that need them, because most jobs
that look at a checkpoint need only its configuration.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headroom.errors import InputError

if TYPE_CHECKING:
    import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
SIZES = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
POSITIONS = 512  # that a model trained here takes, or its training window where that is longer
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "source.spm",  # Marian's, one a language
    "target.spm",
    "target_vocab.json",
)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama-like decoder (the counts a study needs before it loads a weight)."""

    family: str
    layers: int
    heads: int  # H, query heads
    groups: int  # G, key/value heads
    head_dim: int  # d
    hidden: int  # D
    vocabulary: int
    qk_norm: bool

    @property
    def heads_per_group(self) -> int:
        """n = H / G query heads share one key/value head."""
        return self.heads // self.groups


def read_config(checkpoint: str | os.PathLike) -> dict:
    """Return ``config.json`` of a checkpoint folder.

    Raises:
        InputError: if the folder holds none.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise InputError(
            f"checkpoint {checkpoint}: there is no config.json (a transformers folder)"
        )
    return read_object(path)


def geometry(config: dict, name: str = "checkpoint") -> Geometry:
    """Return the sizes of the model that a ``config.json`` describes.

    Raises:
        InputError: for a family, a rotary embedding or head counts that the studies can't serve.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{name}: model_type {family!r} is not served (allowed: {', '.join(FAMILIES)})"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise InputError(f"{name}: rope_type {kind!r} is not served (allowed: {STATIC_ROPE})")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise InputError(f"{name}: partial_rotary_factor {partial} is not served (allowed: 1.0)")
    for size in SIZES:
        if not isinstance(config.get(size), int) or config[size] < 1:
            raise InputError(f"{name}: {size} is {config.get(size)!r} (allowed: a whole number)")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise InputError(f"{name}: {heads} query heads don't divide into {groups} key/value heads")
    return Geometry(
        family=family,
        layers=config["num_hidden_layers"],
        heads=heads,
        groups=groups,
        head_dim=config.get("head_dim") or hidden // heads,
        hidden=hidden,
        vocabulary=config["vocab_size"],
        qk_norm=family == "qwen3",
    )


def load_model(checkpoint: str | os.PathLike, device: str = "cpu", dtype: str = "float32"):
    """Return the causal language model of a checkpoint in evaluation mode.

    Args:
        checkpoint: a folder that stock transformers loads; remote code is never run.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: a torch dtype's name, or ``auto`` for the one it was saved in.

    Raises:
        InputError: if CUDA is asked for and absent.
    """
    from transformers import AutoModelForCausalLM

    check_manifest(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=dtype,
        device_map={"": resolve_device(device)} if device != "cpu" else None,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model.eval()


def resolve_device(device: str) -> str:
    """Return ``cpu`` or ``cuda`` for a configured device.

    Raises:
        InputError: if CUDA is asked for and absent.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "config key compute.device is cuda, but no GPU is visible (allowed: auto, cpu)"
        )
    return device


def load_tokenizer(folder: str | os.PathLike):
    """Return the tokenizer that lies in a checkpoint or tokenizer folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class Tensors:
    """The tensors of a checkpoint by name, each read from its shard when asked for."""

    def __init__(self, checkpoint: str | os.PathLike):
        """Map each name to its shard.

        Raises:
            InputError: if the folder holds no safetensors (pickled weights are not opened), or its
                index names files elsewhere.
        """
        self.folder = Path(checkpoint)
        check_manifest(self.folder)
        self.shards: dict[str, str]
        if (self.folder / INDEX).is_file():
            self.shards = read_index(self.folder)
        elif (self.folder / "model.safetensors").is_file():
            with self._open("model.safetensors") as file:
                self.shards = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise InputError(f"checkpoint {checkpoint}: there is no model.safetensors")

    def _open(self, shard: str):
        from safetensors import safe_open

        return safe_open(self.folder / shard, framework="pt")

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def __getitem__(self, name: str) -> "torch.Tensor":
        with self._open(self.shards[name]) as file:
            return file.get_tensor(name)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.shards)

    def counts(self) -> dict[str, int]:
        """Parameters by tensor, read from the headers alone."""
        return {name: math.prod(dims) for name, (dims, _) in self.shapes().items()}

    def shapes(self) -> dict[str, tuple[list[int], str]]:
        """Shape and dtype of each tensor, read from the headers alone."""
        found = {}
        for shard in sorted(set(self.shards.values())):
            with self._open(shard) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = file.get_slice(name)
                    found[name] = (part.get_shape(), part.get_dtype())
        return found


def read_index(folder: Path, index: str = INDEX, ending: str = ".safetensors") -> dict[str, str]:
    """Return the shard of each tensor by a checkpoint's index.

    Raises:
        InputError: for a shard that is no plain file name: it could lie, or be written, anywhere.
    """
    content = read_object(folder / index)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{folder / index} has no weight_map (allowed: shards by tensor)")
    for shard in sorted(set(found.values()), key=str):
        if not re.fullmatch(rf"[^/\\]+{re.escape(ending)}", str(shard)):
            raise InputError(
                f"{folder / index} names the shard {shard!r} (allowed: names of {ending} files in "
                f"the same folder)"
            )
    return found


def read_object(path: Path) -> dict:
    """Return the object in a JSON file of others.

    Raises:
        InputError: if it holds none.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object")
    return found


class Overlay(Mapping):
    """A checkpoint's tensors with some of them replaced and others added."""

    def __init__(self, parent: Tensors, changed: "Mapping[str, torch.Tensor]"):
        """Lay ``changed`` over a checkpoint."""
        self.parent, self.changed = parent, changed

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self.changed[name] if name in self.changed else self.parent[name]

    def __contains__(self, name: object) -> bool:
        return name in self.changed or name in self.parent

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.parent.names(), *self.changed}))

    def __len__(self) -> int:
        return len({*self.parent.names(), *self.changed})

    def counts(self) -> dict[str, int]:
        """Parameters by tensor, the parent's from its headers alone."""
        return self.parent.counts() | {name: t.numel() for name, t in self.changed.items()}


def write_derived(
    parent: str | os.PathLike,
    output: Path,
    config: dict,
    replace: Callable[[str, "torch.Tensor"], "torch.Tensor"],
    added: Mapping[str, "torch.Tensor"] | None = None,
) -> None:
    """Write a changed copy of a checkpoint, one shard in memory at a time.

    Args:
        parent: the checkpoint to copy.
        output: an existing empty folder.
        config: the ``config.json`` of the copy.
        replace: gets a name and its tensor and returns what to store (the same one to keep it).
        added: tensors that the parent has not, by name; they go into its last shard.
    """
    from safetensors.torch import save_file

    source, added = Tensors(parent), added or {}
    last = max(source.shards.values())
    shards = source.shards | dict.fromkeys(added, last)
    total = 0
    for shard in sorted(set(shards.values())):
        names = sorted(name for name, where in source.shards.items() if where == shard)
        kept = {name: replace(name, source[name]).contiguous() for name in names}
        kept |= {name: t.contiguous() for name, t in added.items() if shard == last}
        total += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        save_file(kept, output / shard, metadata={"format": "pt"})
    if (source.folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": shards}
        write_json(output / INDEX, index)
    write_json(output / "config.json", config)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, output / name)
    write_manifest(output)


def copy_tokenizer(source: str | Path, output: Path) -> None:
    """Copy the files of a tokenizer."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, output / name)


def read_json(path: str | Path) -> dict:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text())


def write_json(path: Path, value: object) -> None:
    """Write JSON that is equal for equal values: sorted keys, final newline, no NaN."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield a file beside ``path`` that takes its place when the block succeeds.

    Args:
        path: never half written; its folder is made.
        durable: whether it must survive a power cut under its name, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        if durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(folder: str | os.PathLike) -> str:
    """SHA-256 of what a folder holds, by its manifest where it has one."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return digest_file(folder / MANIFEST)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = [[path.relative_to(folder).as_posix(), digest_file(path)] for path in files]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of each file of an artifact folder in its ``manifest.json``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": digest_file(p)}
        for p in files
    }
    write_json(folder / MANIFEST, entries)


def check_manifest(folder: str | os.PathLike, hashes: bool = False) -> None:
    """Compare an artifact folder with its manifest: sizes, and hashes where asked.

    A folder without a manifest (not made by the workflow) passes.

    Raises:
        InputError: naming the first file that is missing or damaged and how to make it anew.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return
    anew = f"make it anew: snakemake --cores all -R {folder}"
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        raise InputError(f"{folder / MANIFEST} is damaged (no JSON); {anew}") from None
    for name, entry in entries.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        same = size == entry["bytes"] and (not hashes or digest_file(path) == entry["sha256"])
        if not same:
            found = "missing" if size is None else f"{size} bytes, {entry['bytes']} were written"
            raise InputError(f"{path} is damaged ({found}); {anew}")
