"""Compare the files of checkpoints and records with the hashes in their manifests."""

import sys
from pathlib import Path

from headroom.checkpoints import MANIFEST, check_manifest
from headroom.errors import InputError


def verify(root: Path) -> list[str]:
    """Return one line for each damaged folder with a manifest under ``root``."""
    damaged = []
    for manifest in sorted(root.rglob(MANIFEST)):
        try:
            check_manifest(manifest.parent, hashes=True)
        except InputError as error:
            damaged.append(str(error))
    return damaged


if __name__ == "__main__":
    lines = verify(Path(sys.argv[1]))
    print("\n".join(lines) or "everything with a manifest is as it was written")
    sys.exit(bool(lines))
