"""What a message may hold: one line, nothing secret, and a failed job's last words likewise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headroom.errors import InputError, hide, one_line, redacted, shown

SOURCE = Path(__file__).parents[3] / "src"


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("MY_API_KEY", "hf_abcdefghijklmnop-and-more")
    monkeypatch.setenv("SHORT_KEY", "the")
    monkeypatch.setenv("KEYBOARD", "a-long-layout-name")
    monkeypatch.setattr("headroom.errors._secrets", set())


def test_secrets_are_struck_out_and_words_are_not():
    text = "Bearer hf_abcdefghijklmnop-and-more, hf_abcdefghijklmnop, the a-long-layout-name"
    assert redacted(text) == "Bearer ***, ***, the a-long-layout-name"
    assert redacted("login sesame") == "login sesame"
    hide("sesame")
    assert str(InputError("login sesame\nhttps://me:a@b@host:80/x@y")) == (
        r"login ***\nhttps://***@host:80/x@y"
    )


@pytest.mark.parametrize("text", ["a\nb", "a\r\x1b[31mb", "a\u2028b", "\ud800", "\u202etxt", "\0"])
def test_a_message_is_one_printable_line(text):
    message = str(InputError(f"config key x is {text}"))
    assert message.isprintable() and message.startswith("config key x is ")
    message.encode()
    assert one_line("שלום é 한국어 λ") == "שלום é 한국어 λ"


def test_values_are_shown_by_their_beginning():
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "a list (1)" and shown({"a": 1, "b": 2}) == "keys and values (2)"
    assert len(shown("x" * 10_000)) < 100


JOB = """
from types import SimpleNamespace as Made
from headroom import jobs
from headroom.errors import InputError
job = Made(log=["job.log"], params=Made(code="c", settings={}), input=[], output=[])
job.resources = Made(failures=0)
jobs.start(job)
try:
    raise KeyError("inner hf_abcdefghijklmnop")
except KeyError as error:
    raise %s("outer hf_abcdefghijklmnop") from error
"""


@pytest.mark.parametrize("kind", ["RuntimeError", "InputError"])
def test_the_last_words_of_a_job_hold_no_secret(tmp_path, kind):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    run = subprocess.run([sys.executable, "-c", JOB % kind], cwd=tmp_path, env=environment)
    assert run.returncode == 1
    said = (tmp_path / "job.log").read_text()
    assert "outer ***" in said and ("inner ***" in said) == (kind == "RuntimeError")
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert "hf_abcdefghijklmnop" not in path.read_text(), path
    assert len(list(tmp_path.glob("results/.state/failures/*"))) == (kind == "InputError")
