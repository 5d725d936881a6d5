"""What a failed run says: the end of each lost job's log and the command for that job alone."""

import shlex
from types import SimpleNamespace

import pytest

from headroom.failures import LINES, command, explain, tail


def failed(output, log, **wildcards):
    return SimpleNamespace(
        rule=SimpleNamespace(name="evaluate"), wildcards=wildcards, log=[log], output=[output]
    )


def test_the_end_of_a_log_is_printable_lines(tmp_path):
    log = tmp_path / "a.log"
    log.write_bytes(b"old\n" * 30000 + b"1/3\r2/3\r3/3\n\x1b[31mred\xff\n\nheadroom: why  \n")
    found = tail(log)
    assert found[-5:] == ["1/3", "2/3", "3/3", "�[31mred�", "headroom: why"]
    assert len(found) == LINES and found[0] == "old"
    assert tail(tmp_path / "none.log") == []


@pytest.mark.parametrize(
    ("called", "kept"),
    [
        ("--cores 2 heads", "--cores 2"),
        ("-c2 -k heads ffn", "--cores 2"),
        ("-call --configfile a 'b c' -- heads", "--cores all --configfile a 'b c'"),
        ("--profile slurm --until evaluate --config a=1", "--profile slurm --config a=1"),
        ("--profile=slurm -j 5 --retries 0 heads", "--jobs 5 --profile slurm"),
        ("all --cores --forcerun evaluate", "--cores"),
    ],
)
def test_the_command_keeps_what_the_job_needs_and_nothing_that_makes_more(called, kept):
    found = command(["/no/where/snakemake", *shlex.split(called)], "results/x y")
    assert found == ["/no/where/snakemake", *shlex.split(kept), "--", "results/x y"]


def test_every_lost_job_is_told_also_those_of_a_group(tmp_path):
    (tmp_path / "b.log").write_text("working\nheadroom: out of luck\n")
    alone = failed("results/b", tmp_path / "b.log", recipe="tiny", corpus="docs")
    group = SimpleNamespace(jobs=[failed("results/a", tmp_path / "no.log")])
    text = explain([alone, group], ["/s/snakemake", "--cores", "2"])
    first, second, last = text.split("\n\n")
    assert first.startswith("FAILED evaluate\n  no word in ") and "-- results/a" in first
    assert second.splitlines()[0] == "FAILED evaluate (recipe=tiny, corpus=docs)"
    assert second.splitlines()[2:4] == ["    working", "    headroom: out of luck"]
    assert last.startswith("headroom: 2 failed. ") and last.endswith(": /s/snakemake --cores 2")


def test_a_run_that_was_stopped_says_how_to_go_on():
    text = explain([], ["/s/snakemake", "--cores", "2", "a b"])
    assert "\n" not in text and text.endswith("run the same again: /s/snakemake --cores 2 'a b'")
