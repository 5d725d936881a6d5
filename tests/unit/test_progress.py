"""What a loop says of itself: lines in a log, tqdm's bar on a terminal."""

import re
import sys
import time

import pytest

from headroom import progress as module
from headroom.progress import Lines, progress


@pytest.fixture
def log(monkeypatch, capsys):
    """Reports every 50 ms, and what was written of them."""
    monkeypatch.setattr(module, "SECONDS", 0.05)
    return lambda: capsys.readouterr().err


def test_a_log_gets_lines_with_what_is_done_and_left_but_not_one_a_step(log):
    for _ in progress(range(300), "layers", unit="layer"):
        time.sleep(0.001)
    text = log()
    lines = text.splitlines()
    assert "\r" not in text and text.endswith("\n")
    assert 3 < len(lines) < 100
    assert lines[0].startswith("layers: 0/300")
    assert re.fullmatch(r"layers: \d+/300, 00:0\d so far, 00:\d\d left, +[\d.]+layer/s", lines[2])
    assert lines[-1].startswith("layers: 300/300") and not lines[-2].startswith("layers: 300/300")


def test_what_goes_on_from_a_state_counts_from_there_and_says_its_loss(log):
    with progress(desc="training", total=5, initial=3, unit="step") as bar:
        for _ in range(2):
            bar.set_postfix_str("loss 2.5", refresh=False)
            bar.update()
    first, last = log().splitlines()
    assert first.startswith("training: 3/5")
    assert last.startswith("training: 5/5") and last.endswith(", loss 2.5")


def test_a_loop_that_breaks_has_no_last_line_after_its_error(log):
    """The last line of a failed job's log must be its error."""

    def broken():
        for number in progress(range(5), "layers"):
            if number == 3:
                raise ValueError

    with pytest.raises(ValueError):
        broken()
    assert log().splitlines() == ["layers: 0/5, 00:00 so far, ? left, ?it/s"]


def test_a_short_loop_inside_another_is_silent_and_an_open_one_promises_nothing(log):
    assert list(progress(range(3), "looks", delay=5)) == [0, 1, 2]
    assert log() == ""
    list(progress(iter(range(3)), "documents", unit="document"))
    text = log()
    assert "left" not in text and "documents: 3, " in text


def test_a_terminal_gets_tqdms_own_bar(log, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress(range(2), "layers")
    assert not isinstance(bar, Lines)
    list(bar)
    text = log()
    assert "\r" in text and "100%" in text


def test_a_disabled_bar_ends_in_silence(log):
    progress(total=0, disable=True).close()
    assert list(progress(range(3), disable=True)) == [0, 1, 2]
    assert log() == ""
