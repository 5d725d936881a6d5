"""Compare the files of checkpoint folders with the hashes in their manifests."""

import sys
from pathlib import Path

from headroom.checkpoints import MANIFEST, check_manifest
from headroom.errors import InputError


def verify(root: Path) -> list[str]:
    """Return one line for each damaged checkpoint folder under ``root``."""
    damaged = []
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        try:
            check_manifest(manifest.parent, hashes=True)
        except InputError as error:
            damaged.append(str(error))
    return damaged


if __name__ == "__main__":
    lines = verify(Path(sys.argv[1]))
    print("\n".join(lines) or "every checkpoint is as it was written")
    sys.exit(bool(lines))
