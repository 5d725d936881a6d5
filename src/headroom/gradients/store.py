"""Features on disk by batch and group of layers, shared by all jobs that need them.

A batch's head (squared norms, losses, hidden states) is written last: where it lies, the batch is
complete. Each batch has a lock, so that jobs that need the same ones share the work.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from headroom.checkpoints import replacing
from headroom.errors import InputError
from headroom.gradients.features import Features, packed, unpacked
from headroom.gradients.pairs import block
from headroom.gradients.similarity import Head, Measurer, Samples
from headroom.locks import flock

IDENTITY = "identity.json"


def groups(layers: Iterable[str]) -> dict[str, list[str]]:
    """Return the layers that share a file: those of a decoder block."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        number = block(layer)
        name = layer if number is None else f"block{number:03d}"
        found.setdefault(name, []).append(layer)
    return found


class Store:
    """Features of one set of samples."""

    def __init__(self, folder: Path, identity: Mapping, layers: Sequence[str]):
        """Open a store, or begin one.

        Args:
            folder: of this set alone.
            identity: what the features hang on; plain values.
            layers: parameter names; those of a decoder block share a file.

        Raises:
            InputError: if the folder holds features of another identity.
        """
        self.folder, self.groups = folder, groups(layers)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            self._check(dict(identity))

    def _check(self, identity: dict) -> None:
        path = self.folder / IDENTITY
        if not path.exists():
            with replacing(path, durable=True) as part:
                part.write_text(json.dumps(identity, sort_keys=True))
            return
        found = json.loads(path.read_text())
        for name in sorted({*found, *identity}):
            if found.get(name) != identity.get(name):
                raise InputError(
                    f"{self.folder} holds features of another run: {name} is {found.get(name)}, "
                    f"here it is {identity.get(name)}; delete that folder and run again"
                )

    def ensure(self, number: int, samples: Samples, measurer: Measurer, wait: bool) -> bool:
        """Make a batch's features unless they are there; say whether they are.

        Args:
            number: of the batch.
            samples: of it.
            measurer: makes them.
            wait: for another job that is making them; else leave them to it.
        """
        if self.complete(number):
            return True
        with _locked(self._path(number, "lock"), wait) as held:
            if not held:
                return False
            if not self.complete(number):
                self._make(number, samples, measurer)
        return True

    def complete(self, number: int) -> bool:
        """Whether a batch's features are there."""
        return self._path(number, "head").exists()

    def _make(self, number: int, samples: Samples, measurer: Measurer) -> None:
        group_of = {layer: name for name, layers in self.groups.items() for layer in layers}
        kept: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in self.groups}

        def consume(layer: str, features: Features) -> None:
            name = group_of[layer]
            kept[name][layer] = {k: t.cpu() for k, t in packed(layer, features).items()}
            if len(kept[name]) == len(self.groups[name]):
                self._write(number, name, kept[name])
                kept[name] = {}

        head = measurer.measure(samples, consume)
        for name, layers in kept.items():
            if layers or not self._path(number, name).exists():  # some have no gradient
                self._write(number, name, layers)
        save = {key: tensor.contiguous() for key, tensor in head._asdict().items()}
        with replacing(self._path(number, "head"), durable=True) as part:
            save_file(save, part)

    def _write(self, number: int, name: str, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
        whole = {key: tensor for tensors in layers.values() for key, tensor in tensors.items()}
        with replacing(self._path(number, name), durable=True) as part:
            save_file(whole, part)

    def head(self, number: int) -> Head:
        """Return what a batch left beside its features."""
        return Head(**load_file(self._path(number, "head")))

    def read(self, number: int, layer: str) -> Features | None:
        """Return a batch's features of a layer; None where it has no gradient."""
        name = next(name for name, layers in self.groups.items() if layer in layers)
        with safe_open(self._path(number, name), framework="pt") as file:
            own = [k for k in file.keys() if k == layer or k.startswith(f"{layer}#")]  # noqa: SIM118
            # Copies, because in a file tensors begin anywhere, and products of matrices that don't
            # begin at a cache line differ in their last bits.
            return unpacked(layer, {key: file.get_tensor(key).clone() for key in own})

    def _path(self, number: int, name: str) -> Path:
        return self.folder / f"{number:06d}.{name}"


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock; without waiting, say whether it was to be had."""
    with path.open("w") as file:
        try:
            flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
