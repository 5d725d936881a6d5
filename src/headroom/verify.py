"""Compare all results with the hashes that were taken when they were written."""

import sys
from pathlib import Path

from headroom import sums


def verify(root: Path) -> list[str]:
    """Return one line for each damaged file or folder under ``root`` of which there are hashes."""
    return sums.damaged(root)


if __name__ == "__main__":
    lines = verify(Path(sys.argv[1]))
    print("\n".join(lines) or "everything that is recorded is as it was written")
    sys.exit(bool(lines))
