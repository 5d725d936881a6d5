"""The gradients study on real jobs: plan, partitions, endpoints that fail, samples that are bad."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from .conftest import SMALL, changed
from .test_scenarios import add_as_written

pytestmark = pytest.mark.workflow
ROOT = "results/gradients/tiny/objects/model_generated/two_sided"


def test_every_file_of_the_study_is_there(finished):
    root = finished.folder / ROOT
    for name in ("retrieval.csv", "layers.csv", "greedy.csv", "self_similarity.parquet"):
        assert (root / name).stat().st_size > 50, name
    for name in ("heatmap", "accuracy", "greedy", "layers", "parameters", "self_similarity"):
        assert (root / "figures" / f"{name}.png").is_file(), name
        assert (root / "figures" / f"{name}.svg").is_file(), name
    found = json.loads((root / "export/similarities.json").read_text())
    summary = json.loads((root / "summary.json").read_text())
    assert len(found) == summary["queries"] >= 6
    assert {len(row) for row in found.values()} == {summary["originals"]} == {9}
    errors = (finished.folder / "results/gradients/tiny/objects/errors/two_sided.csv").read_text()
    assert errors.splitlines()[-1].startswith("full,")
    kept = list((finished.folder / "results/.state").rglob("*.head"))
    assert kept == [], "features are gone when the run is over"


def test_partitions_and_storage_change_no_byte(copied):
    names = ("dots", "states")
    before = {name: (copied.folder / ROOT / f"{name}.safetensors").read_bytes() for name in names}
    config = changed("gradients.partitions", 1)
    config["gradients"] |= {"disk_gb": 0, "memory_gb": 0.001}
    copied.configure(config)
    copied.run("--cores", "2", *(f"{ROOT}/{name}.safetensors" for name in names))
    for name in names:
        assert (copied.folder / ROOT / f"{name}.safetensors").read_bytes() == before[name]


def test_the_plan_is_to_be_had_beforehand(copied):
    target = f"{ROOT.replace('two_sided', 'auto')}/plan.json"
    copied.run("--cores", "1", target)
    plan = json.loads((copied.folder / target).read_text())
    assert plan["stored"] and plan["passes"] == plan["originals"] + plan["queries"]
    copied.configure(changed("gradients.disk_gb", 0))
    copied.run("--cores", "1", target)
    tiled = json.loads((copied.folder / target).read_text())
    assert tiled["passes"] == plan["originals"] + 2 * plan["queries"], "two partitions, two tiles"
    copied.configure(changed("gradients.memory_gb", 1.0e-6))
    failed = copied.run("--cores", "1", target, check=False)
    assert "gradients.memory_gb is 1e-06: one layer of one block" in failed.stdout + failed.stderr


def rows(folder, name, *items):
    lines = [json.dumps(dict(zip(("id", "prompt", "answer"), item, strict=True))) for item in items]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


GOOD = [(f"s{n}", f"What is {n} and {n}?", f"It is {2 * n}, as everyone knows.") for n in range(4)]
BROUGHT = {"path": {"path": "paraphrased.jsonl"}}
BAD = {
    # samples, paraphrases, settings of the set, target, what is said
    "ids_collide": ([*GOOD, (*GOOD[0][:2], "Other.")], GOOD, {}, "original", "id 's0'"),
    "ids_lacking": (GOOD, GOOD[:2], {"paraphraser": BROUGHT}, "paraphrased", "s2, s3"),
    "no_key": (
        GOOD,
        GOOD,
        {
            "paraphraser": {
                "endpoint": {"model": "m", "url": "http://127.0.0.1:9", "key": "NO_SUCH"}
            }
        },
        "paraphrased",
        "environment variable NO_SUCH is not set",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_one_line(empty, case):
    samples, paraphrases, settings, target, said = BAD[case]
    rows(empty.folder, "samples.jsonl", *samples)
    rows(empty.folder, "paraphrased.jsonl", *paraphrases)
    empty.configure(changed("instructions.bad", {"path": "samples.jsonl", **settings}))
    result = empty.run("--cores", "1", f"results/instructions/bad/{target}.jsonl", check=False)
    shown = map(str.strip, result.stderr.splitlines())
    lines = {line for line in shown if line.startswith("headroom: ")}
    assert result.returncode != 0 and any(said in line for line in lines), lines
    assert "Traceback" not in result.stderr
    assert not (empty.folder / f"results/instructions/bad/{target}.jsonl").exists()


def test_empty_and_long_samples_are_counted_and_named(copied):
    long = "many words " * 100
    samples = [*GOOD, ("e", "What?", ""), ("l", "Which?", long)]
    rows(copied.folder, "samples.jsonl", *samples)
    rows(copied.folder, "paraphrased.jsonl", *samples[:4], ("l", "Which one?", "Short."))
    source = {"path": "samples.jsonl", "paraphraser": BROUGHT}
    config = changed("instructions", {"mine": source})
    config["gradients"] |= {"settings": ["paraphrased"], "length": 120, "partitions": 1}
    copied.configure(config)
    root = "results/gradients/tiny/mine/paraphrased/two_sided"
    copied.run("--cores", "2", f"{root}/table.html")
    counts = json.loads((copied.folder / "results/instructions/mine/original.json").read_text())
    assert counts["empty"] == 1 and counts["samples"] == 5
    page = (copied.folder / root / "table.html").read_text()
    assert "left out: 1 too long (originals); 1 queries whose original was left out" in page
    config["gradients"]["too_long"] = "refuse"
    copied.configure(config)
    failed = copied.run("--cores", "2", f"{root}/table.html", check=False)
    assert "headroom: sample l has" in failed.stderr and "skip or cut" in failed.stderr


class Endpoint(BaseHTTPRequestHandler):
    """Answers so many requests, then fails."""

    left, asked = 5, 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        cls.asked += 1
        if cls.left <= 0:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "budget used up, key sk-7-secret"}}')
            return
        cls.left -= 1
        text = body["messages"][-1]["content"].replace("What is", "Tell me, what is")
        text = text.replace("as everyone knows", "as is known to all")
        reply = {"role": "assistant", "content": text}
        answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": reply}]}
        answer |= {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_what_an_endpoint_was_paid_for_is_kept(empty, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OWN_KEY", "sk-7-secret")
    rows(empty.folder, "samples.jsonl", *GOOD)
    endpoint = {
        "url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "model": "m",
        "key": "OWN_KEY",
        "concurrency": 1,
        "max_retries": 0,
    }
    source = {"path": "samples.jsonl", "paraphraser": {"endpoint": endpoint}}
    empty.configure(changed("instructions.mine", source))
    target = "results/instructions/mine/paraphrased.jsonl"
    failed = empty.run("--cores", "1", "--retries", "0", target, check=False)
    assert failed.returncode != 0 and "5 paraphrases are kept" in failed.stderr
    assert not (empty.folder / target).exists() and Endpoint.asked <= 7
    Endpoint.left, Endpoint.asked = 100, 0
    empty.run("--cores", "1", target)
    assert Endpoint.asked == 2 * len(GOOD) - 5
    assert len((empty.folder / target).read_text().splitlines()) == len(GOOD)
    endpoint["concurrency"] = 2
    empty.configure(changed("instructions.mine", source))
    assert empty.planned(target) == {}, "how many requests run at once decides no text"
    server.shutdown()
    written = [path for path in (empty.folder / "results").rglob("*") if path.is_file()]
    assert written and all(b"sk-7-secret" not in path.read_bytes() for path in written)
    assert "sk-7-secret" not in failed.stdout + failed.stderr


def test_the_readmes_own_backend_and_baseline_work_as_written(copied):
    add_as_written(copied, "Add your own backend or baseline of the gradients study")
    config = copy.deepcopy(SMALL)
    config["gradients"] |= {"backends": ["sampled"], "partitions": 1}
    copied.configure(config)
    root = ROOT.replace("two_sided", "sampled")
    copied.run("--cores", "2", f"{root}/retrieval.csv", f"{root}/../../errors/sampled.csv")
    text = (copied.folder / root / "retrieval.csv").read_text()
    assert "\nbaseline,shared_words," in text and "\nfull," in text
