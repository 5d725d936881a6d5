"""The endpoint's paraphraser against a server in this process: failures, retries and the key."""

import contextlib
import json
import logging
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headroom.corpora.instructions import Sample, read_samples, write_samples
from headroom.corpora.paraphrase import paraphrase_samples
from headroom.errors import InputError

SECRET = "sk-very-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Plays an endpoint: ``answer(number of the request, its text)`` gives status and text."""

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.lock = answer, [], threading.Lock()
        self.most, self.running = 0, 0

    def handle_error(self, request, client_address):
        pass  # clients that gave up


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((self.path, self.headers["Authorization"], body))
            number = len(server.requests)
            server.running += 1
            server.most = max(server.most, server.running)
        status, text = server.answer(number, body["messages"][-1]["content"])
        with server.lock:
            server.running -= 1
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        reply |= {"choices": [choice]} if status == 200 else {"error": {"message": text}}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(answer):
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    original, output = tmp_path / "original.jsonl", tmp_path / "out.jsonl"
    write_samples(original, [Sample(str(i), f"What is {i}?", f"It is {i}.") for i in range(8)])

    def go(server, **changed):
        port = server if isinstance(server, int) else server.server_port
        settings = {
            "url": f"http://127.0.0.1:{port}/v1",
            "model": "m",
            "key": "SOME_KEY",
            "temperature": 1.0,
            "seed": 42,
            "concurrency": 4,
            "timeout": 5,
            "max_retries": 2,
            **changed,
        }
        counts, notes = paraphrase_samples(
            "endpoint", settings, original, output, tmp_path / "cache", "x"
        )
        return counts, notes, read_samples(output)

    return go


def again(number, text):
    return 200, f"Again: {text} "


def test_texts_are_asked_for_at_once_and_the_order_stays(run):
    def slow(number, text):
        time.sleep(0.02 if number % 3 else 0.05)
        return again(number, text)

    with serving(slow) as server:
        counts, notes, samples = run(server)
        assert counts["paraphrased"] == 8 and notes == {"asked": 16, "from_cache": 0}
        assert samples == [
            Sample(str(i), f"Again: What is {i}?", f"Again: It is {i}.") for i in range(8)
        ]
        assert 1 < server.most <= 4
        path, authorization, body = server.requests[0]
        assert path == "/v1/chat/completions" and authorization == f"Bearer {SECRET}"
        assert body["seed"] == 42 and body["temperature"] == 1.0 and body["model"] == "m"
        assert [m["role"] for m in body["messages"]] == ["system", "user"]
        run(server)
        assert len(server.requests) == 16  # all from the cache
        run(server, key=None, seed=None, temperature=None)  # a server of one's own
        assert set(server.requests[-1][2]) == {"model", "messages"}


def test_a_refused_text_is_asked_again_with_another_seed(run):
    asked = []

    def stubborn(number, text):
        asked.append(text)
        return 200, text if asked.count(text) < 2 else f"Again: {text}"

    with serving(stubborn) as server:
        counts, _, _ = run(server)
        assert counts["paraphrased"] == 8 and len(server.requests) == 32
        assert {body["seed"] for _, _, body in server.requests} == {42, 43}


def test_only_the_rest_is_asked_for(run):
    state = {"open": 6}

    def failing(number, text):
        state["open"] -= 1
        return again(number, text) if state["open"] >= 0 else (503, f"busy {SECRET}")

    with serving(failing) as server:
        with pytest.raises(
            RuntimeError, match=r"status 503: .*busy \*\*\*.* \(6 paraphrases are kept"
        ):
            run(server, max_retries=0)
        before, state["open"] = len(server.requests), 100
        _, notes, samples = run(server)
        assert notes == {"asked": 10, "from_cache": 6} and len(samples) == 8
        assert len(server.requests) == before + 10


def test_a_busy_server_is_asked_again(run):
    seen = set()

    def busy(number, text):
        if text in seen:
            return again(number, text)
        seen.add(text)
        return 429, "slow down"

    with serving(busy) as server:
        assert run(server)[0]["paraphrased"] == 8 and len(server.requests) == 32
    with (
        serving(lambda *_: (429, "slow down")) as server,
        pytest.raises(RuntimeError, match=r"status 429: .*slow down") as caught,
    ):
        run(server)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            401,
            r"endpoint.key: http://127.0.0.1:\d+/v1 refuses the key in environment variable SOME",
        ),
        (403, r"endpoint.key: .* \(status 403; allowed: a key that may use m\)"),
        (404, r"endpoint: .* knows no model 'm'"),
    ],
)
def test_the_key_is_in_no_message_log_or_file(run, tmp_path, caplog, capfd, status, message):
    caplog.set_level(logging.DEBUG)
    with (
        serving(lambda *_: (status, f"wrong key {SECRET}")) as server,
        pytest.raises(
            InputError, match=rf"config key instructions.x.paraphraser.{message}"
        ) as caught,
    ):
        run(server)
    shown = (
        "".join(traceback.format_exception(caught.value))
        + caplog.text
        + "".join(capfd.readouterr())
    )
    assert SECRET not in shown
    error = caught.value
    while error is not None:  # nor in what a debugger would find behind it
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__
    assert not any(SECRET in file.read_text() for file in tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("value", [None, "", " "])
def test_without_a_key_nothing_is_sent(run, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("SOME_KEY")
    else:
        monkeypatch.setenv("SOME_KEY", value)
    wanted = (
        r"config key instructions.x.paraphraser.endpoint.key: environment variable SOME_KEY is not"
    )
    with serving(again) as server:
        with pytest.raises(InputError, match=wanted):
            run(server)
        assert not server.requests


def test_addresses_that_do_not_answer(run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=r"endpoint.url: http://127.0.0.1:\d+/v1 can't be reached"):
        run(port, max_retries=0)

    def asleep(number, text):
        time.sleep(0.6)
        return again(number, text)

    with (
        serving(asleep) as server,
        pytest.raises(RuntimeError, match=r"gave no answer within 0.2 s"),
    ):
        run(server, timeout=0.2, max_retries=0)
