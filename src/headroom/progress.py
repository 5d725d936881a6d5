"""How far a long loop is: a bar on a terminal, now and then a line in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as Bar

SECONDS = 10.0  # between two lines of a log
LINE = "{desc}: {n_fmt}/{total_fmt}, {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"
OPEN = "{desc}: {n_fmt}, {elapsed} so far, {rate_fmt}{postfix}"  # nobody knows how many


class Lines(Bar):
    """A bar for a file: each report is a line of its own, the last one when the loop has ended."""

    def __init__(self, *args: Any, **options: Any):
        """Take what tqdm takes."""
        own = {"mininterval": SECONDS, "leave": False, "file": sys.stderr}
        super().__init__(*args, **options | own)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, but none where tqdm would wipe its bar away."""
        if msg is None:
            self.bar_format = LINE if self.total else OPEN
            print(self, file=self.fp, flush=True)

    def close(self) -> None:
        """Write the last line, unless the loop was left before its end or was too short to show."""
        ended = not self.disable and (not self.total or self.n >= self.total)
        if ended and self.n > self.last_print_n and self.format_dict["elapsed"] >= self.delay:
            self.refresh()
            self.last_print_n = self.n
        super().close()


def progress(
    iterable: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    unit: str = "it",
    **options: Any,
) -> Bar:
    """Return tqdm's bar over an iterable, or one to be updated by hand.

    Args:
        iterable: what is gone through.
        desc: what is counted.
        total: how many there are, where the iterable can't tell.
        unit: one of them.
        options: tqdm's own.
    """
    kind = Bar if sys.stderr.isatty() else Lines
    return kind(iterable, desc=desc, total=total, unit=unit, **options)
