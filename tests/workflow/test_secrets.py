"""Keys and tokens stay in the environment, whatever servers send back."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from .conftest import SMALL, changed

pytestmark = pytest.mark.workflow

SECRETS = {
    "HF_TOKEN": "hf_sentinelSentinelOneABCDEFGHIJKLM",
    "OPENAI_API_KEY": "sk-sentinel-two-0123456789abcdef",
    "LAB_LOGIN": "sentinel-three/with+odd=characters",  # a name that says nothing
}


class Echo(BaseHTTPRequestHandler):
    """Plays endpoints and a hub that quote the request's headers in every error."""

    def do_GET(self):
        self.refuse(401)

    do_HEAD = do_GET

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = int(body["model"])
        if status != 200:
            self.refuse(status)
            return
        answer = f"Said otherwise: {body['messages'][-1]['content']}"
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        self.answer(200, json.dumps(reply | {"choices": [choice]}))

    def refuse(self, status):
        sent = self.headers.get("Authorization", "")
        with self.server.lock:
            self.server.seen.add(sent)
        quoted = json.dumps({"error": {"message": f"wrong {sent}", "headers": {"auth": sent}}})
        named = {
            "X-Error-Message": f"wrong {sent}",
            "X-Request-Id": sent,
            "X-Error-Code": "GatedRepo",
        }
        self.answer(status, quoted, named)

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.seen, server.lock = set(), threading.Lock()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def spellings(secret):
    """A secret as it stands, and inside a base64 text, as reports hold files."""
    yield secret.encode()
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + secret.encode())
        yield coded[4 if shift else 0 : len(coded) // 4 * 4 - 4]


def assert_nowhere(folder, shown, secrets):
    texts = {str(path.relative_to(folder)): path.read_bytes() for path in files(folder)}
    texts["the terminal"] = shown.encode()
    for name, secret in secrets.items():
        for spelling in spellings(secret):
            found = [place for place, content in texts.items() if spelling in content]
            assert not found, f"{name} is in {found}"
    return texts


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def test_no_key_is_in_a_file_or_the_terminal(empty, server, tmp_path_factory, monkeypatch):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    config = changed("checkpoints.fetched", {"hub": "me/model"})
    config["translators"]["opus"] = {"hub": "me/opus", "pickle": True}
    config["corpora"]["fetched"] = {"hub": "me/texts"}
    for status in (200, 401, 500):
        for key in ("OPENAI_API_KEY", "LAB_LOGIN"):
            asked = {"url": f"{address}/v1", "model": str(status), "key": key, "max_retries": 0}
            config["instructions"][f"s{status}_{key.lower()}"] = {
                **SMALL["instructions"]["objects"],
                "paraphraser": {"endpoint": asked},
            }
    empty.configure(config)
    sets = [f"results/instructions/{name}/paraphrased.jsonl" for name in config["instructions"]]
    fetched = ["results/checkpoints/fetched", "results/checkpoints/opus"]
    targets = [*sets, *fetched, "results/corpora/fetched/counts.json"]
    options = ("--cores", "2", "--keep-going", "--retries", "0", "--verbose", "--printshellcmds")
    run = empty.run(*options, *targets, check=False)
    shown = run.stdout + run.stderr
    assert run.returncode != 0
    made = [name for name in sets if (empty.folder / name).exists()]
    assert [name for name in made if "s200" in name or "objects" in name] == made and len(made) == 3
    done = empty.run("--report", "report.html", *made)
    wanted = {f"Bearer {secret}" for secret in SECRETS.values()}
    assert wanted <= server.seen, "each was sent and quoted"
    texts = assert_nowhere(empty.folder, shown + done.stdout + done.stderr, SECRETS)
    logs = "\n".join(text.decode() for place, text in texts.items() if place.endswith(".log"))
    assert "refuses the key in environment variable LAB_LOGIN (status 401" in logs
    assert re.search(r"status 500: .*wrong Bearer \*\*\*", logs)
    for key in ("checkpoints.fetched.hub", "translators.opus.hub", "corpora.fetched"):
        assert f"headroom: config key {key}: me/" in logs
    assert any(place.startswith(".snakemake/metadata") for place in texts)
    assert len(texts["report.html"]) > 10_000


def test_an_address_with_a_password_is_refused_and_not_shown(empty):
    secrets = {"password": "sentinelPasswordSixteen"}
    address = f"https://me:{secrets['password']}@host.example/v1"
    endpoint = {"endpoint": {"url": address, "model": "m"}}
    empty.configure(changed("instructions.objects.paraphraser", endpoint))
    run = empty.run("-n", check=False)
    (empty.folder / "config.yaml").unlink()
    assert_nowhere(empty.folder, run.stdout + run.stderr, secrets)
    key = "instructions.objects.paraphraser.endpoint.url"
    assert f"headroom: config key {key} holds an address with a user or password" in run.stderr
