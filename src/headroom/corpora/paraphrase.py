"""Rewrite samples with any paraphraser: one interface, a cache of what was paid for, quality gates.

A paraphraser takes texts and the number of the attempt, from 0, which moves its seed, and yields
(place among the texts, paraphrase) in any order, as they are done. Nothing here imports more than
it takes to read a configuration; a kind's own module is imported where it is made.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headroom.corpora.instructions import Sample, read_samples, write_brought, write_samples
from headroom.corpora.paraphrase_gates import GATES, gates_of, refusal
from headroom.errors import InputError
from headroom.progress import progress

Paraphraser = Callable[[Sequence[str], int], Iterator[tuple[int, str]]]

ROLES = ("prompt", "answer")
Text = tuple[int, str]  # place of its sample, role


class Kind(NamedTuple):
    """How a kind of paraphraser is checked, told apart and made."""

    check: Callable[[Mapping, str], None]  # settings, configuration key; light
    identity: Callable[[Mapping], dict]  # all settings that decide the text; light
    make: Callable[[Mapping, str], Paraphraser]  # settings, configuration key
    attempts: int  # unless the settings say so
    cached: bool  # whether a text is dearer to make than to keep


def _check_rules(settings: Mapping, key: str) -> None:
    if not 0 <= settings["strength"] <= 1:
        raise InputError(
            f"config key {key}.strength is {settings['strength']} (allowed: from 0 to 1)"
        )


def _rules_identity(settings: Mapping) -> dict:
    return {name: settings.get(name) for name in ("strength", "seed")}


def _make_rules(settings: Mapping, key: str) -> Paraphraser:
    from headroom.corpora.paraphrase_rules import paraphraser

    return paraphraser(settings, key)


def _check_endpoint(settings: Mapping, key: str) -> None:
    if not re.match(r"https?://[^\s/]", settings["url"]):
        raise InputError(
            f"config key {key}.url is {settings['url']!r} (allowed: an address that begins with "
            f"http:// or https://)"
        )
    if "?" in settings["url"] or "@" in settings["url"].partition("://")[2].partition("/")[0]:
        # Not shown: settings are written into results, so nothing secret may stand there.
        raise InputError(
            f"config key {key}.url holds a password or a query (allowed: an address without; the "
            f"key comes from the environment variable that {key}.key names)"
        )
    variable = settings.get("key")
    if variable is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", variable):
        # Not shown: it may be the key itself.
        raise InputError(
            f"config key {key}.key is no name of an environment variable (allowed: the name of the "
            f"variable that holds the key, in capitals, such as OPENAI_API_KEY, never the key)"
        )


def _endpoint_identity(settings: Mapping) -> dict:
    from headroom.corpora.paraphrase_endpoint import SYSTEM

    names = ("url", "model", "temperature", "seed")
    return {name: settings.get(name) for name in names} | {"system": SYSTEM}


def _make_endpoint(settings: Mapping, key: str) -> Paraphraser:
    from headroom.corpora.paraphrase_endpoint import paraphraser

    return paraphraser(settings, key)


def _check_model(settings: Mapping, key: str) -> None:
    if ("path" in settings) == ("hub" in settings):
        raise InputError(f"config key {key}: give path, or hub and revision (allowed: one of both)")
    if "path" in settings and not (Path(settings["path"]).expanduser() / "config.json").is_file():
        raise InputError(
            f"config key {key}.path: {settings['path']} holds no config.json (allowed: a folder "
            f"that transformers loads)"
        )


def _model_identity(settings: Mapping) -> dict:
    from headroom.corpora.paraphrase_endpoint import SYSTEM

    names = ("path", "hub", "revision", "new_tokens", "temperature", "seed", "dtype")
    found = {name: settings.get(name) for name in names} | {"system": SYSTEM}
    if "path" in settings:  # another model may lie there tomorrow
        files = sorted(Path(settings["path"]).expanduser().iterdir())
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        found["files"] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return found


def _make_model(settings: Mapping, key: str) -> Paraphraser:
    from headroom.corpora.paraphrase_model import paraphraser

    return paraphraser(settings, key)


KINDS: dict[str, Kind] = {
    "rules": Kind(_check_rules, _rules_identity, _make_rules, attempts=1, cached=False),
    "endpoint": Kind(_check_endpoint, _endpoint_identity, _make_endpoint, attempts=3, cached=True),
    "model": Kind(_check_model, _model_identity, _make_model, attempts=3, cached=True),
}


def check_paraphraser(kind: str, settings: Mapping, name: str) -> None:
    """Refuse settings that can't work, without network or heavy imports.

    Raises:
        InputError: naming the key of the set ``name`` and what is allowed.
    """
    if kind not in KINDS:
        raise InputError(
            f"config key instructions.{name}.paraphraser has {kind!r} (allowed: {', '.join(KINDS)})"
        )
    KINDS[kind].check(settings, f"instructions.{name}.paraphraser.{kind}")


def identity(kind: str, settings: Mapping) -> str:
    """Return a digest of all settings that decide the text: no key, concurrency or time limit."""
    parts = json.dumps([kind, KINDS[kind].identity(settings)], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def write_paraphrases(
    settings: Mapping, options: Mapping, originals: Path, output: Path, cache: Path, name: str
) -> tuple[dict, dict]:
    """Write the paraphrases of a set by whatever is configured: a paraphraser, or files brought.

    Args:
        settings: ``kind`` and, under its name, what decides the text.
        options: of an endpoint, what doesn't (concurrency, timeout in seconds, max_retries).
        originals, output, cache, name: as in :func:`paraphrase_samples`.
    """
    kind = settings["kind"]
    own = settings[kind]
    if kind == "path":
        return write_brought(own, originals, output, name), {}
    if kind == "endpoint":
        counts = {key: int(options[key]) for key in options if key != "timeout"}
        own = {**own, **options, **counts}
    return paraphrase_samples(kind, own, originals, output, cache, name)


def paraphrase_samples(
    kind: str, settings: Mapping[str, Any], originals: Path, output: Path, cache: Path, name: str
) -> tuple[dict, dict]:
    """Rewrite prompts and answers, each by itself, and write the samples whose both passed.

    A text that a gate refuses is asked for again, up to ``attempts`` times with other seeds.

    Args:
        kind: of :data:`KINDS`.
        settings: of the paraphraser, ``attempts`` too.
        originals: the file of the samples.
        output: the file of the paraphrased samples, in the order of the originals.
        cache: folder of the caches; paraphrases that are there are not asked for.
        name: of the set, for messages.

    Returns:
        counts: samples, paraphrased, left_out by the gate that refused the last attempt (the
        prompt's where both failed), and unchanged prompts and answers; and notes, which differ
        between equal runs: texts asked and from_cache.

    Raises:
        InputError: for settings that can't work, or if no sample passes.
        RuntimeError: if the paraphraser fails; what it gave is in the cache.
    """
    check_paraphraser(kind, settings, name)
    samples, key = read_samples(originals), f"instructions.{name}.paraphraser.{kind}"
    with _Source(kind, settings, cache, key) as source:
        passed, refused = _rewritten(samples, kind, settings, source)
    left_out: Counter[str] = Counter(dict.fromkeys(GATES, 0))
    kept: list[Sample] = []
    for i, sample in enumerate(samples):
        failed = [refused[i, role] for role in ROLES if (i, role) in refused]
        left_out.update(failed[:1])
        if not failed:
            kept.append(Sample(sample.id, *(passed[i, role] for role in ROLES)))
    if not kept:
        reasons = ", ".join(f"{gate} {n}" for gate, n in left_out.items() if n)
        raise InputError(
            f"config key {key}: none of {len(samples)} samples passed the quality gates "
            f"({reasons}; allowed: another paraphraser, or more attempts)"
        )
    write_samples(output, kept)
    return _counts(samples, kept, left_out), source.notes


def _rewritten(
    samples: Sequence[Sample], kind: str, settings: Mapping, source: "_Source"
) -> tuple[dict[Text, str], dict[Text, str]]:
    """Return the paraphrases that passed, and of the other texts the gate that refused the last."""
    attempts = settings.get("attempts", KINDS[kind].attempts)
    if settings.get("temperature") == 0:
        attempts = 1  # no seed would change what is most probable
    gates = {role: gates_of(role, kind, settings) for role in ROLES}
    pending = {(i, role): getattr(s, role) for i, s in enumerate(samples) for role in ROLES}
    passed: dict[Text, str] = {}
    refused: dict[Text, str] = {}
    for attempt in range(attempts):
        found = source.paraphrases(list(dict.fromkeys(pending.values())), attempt)
        for place, text in list(pending.items()):
            gate = refusal(text, found[text], gates[place[1]])
            if gate is None:
                passed[place] = found[text]
                refused.pop(place, None)
                del pending[place]
            else:
                refused[place] = gate
    return passed, refused


def _counts(samples: Sequence[Sample], kept: Sequence[Sample], left_out: Mapping) -> dict:
    originals = {sample.id: sample for sample in samples}
    unchanged = {
        role: sum(getattr(s, role) == getattr(originals[s.id], role) for s in kept)
        for role in ROLES
    }
    counts = {"samples": len(samples), "paraphrased": len(kept)}
    return {**counts, "left_out": dict(left_out), "unchanged": unchanged}


class _Source:
    """A paraphraser behind its cache; it is made when the first text is missing there."""

    def __init__(self, kind: str, settings: Mapping, cache: Path, key: str):
        self.kind, self.settings, self.key = kind, settings, key
        self.paraphraser: Paraphraser | None = None
        self.identity = identity(kind, settings)
        path = Path(cache) / f"{kind}-{self.identity[:16]}.jsonl"
        self.cache = Cache(path) if KINDS[kind].cached else None
        self.notes = {"asked": 0, "from_cache": 0}

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *error: object) -> None:
        if self.cache:
            self.cache.close()

    def paraphrases(self, texts: Sequence[str], attempt: int) -> dict[str, str]:
        """Return the paraphrase of each text; each is kept as soon as it is there."""
        known = self.cache.known if self.cache else {}
        keys = {text: self._key(text, attempt) for text in texts}
        found = {text: known[key] for text, key in keys.items() if key in known}
        missing = [text for text in texts if text not in found]
        self.notes["from_cache"] += len(found)
        try:
            for place, paraphrase in self._asked(missing, attempt):
                if self.cache:
                    self.cache.add(keys[missing[place]], paraphrase)
                found[missing[place]] = paraphrase
                self.notes["asked"] += 1
        except RuntimeError as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            kept = f" ({len(known)} paraphrases are kept: run again for the rest)" if known else ""
            raise RuntimeError(f"{first}{kept}") from error
        return found

    def _asked(self, texts: Sequence[str], attempt: int) -> Iterator[tuple[int, str]]:
        if not texts:
            return
        if self.paraphraser is None:
            self.paraphraser = KINDS[self.kind].make(self.settings, self.key)
        found = self.paraphraser(texts, attempt)
        yield from progress(found, f"attempt {attempt + 1}", len(texts), "text", delay=5)

    def _key(self, text: str, attempt: int) -> str:
        parts = f"{self.identity}\0{attempt}\0{text}"
        return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


class Cache:
    """Paraphrases by key in a file that only grows; each is on the disk before the next is asked.

    The file is locked until it is closed: a second job with the same paraphraser waits and finds
    what the first one paid for.
    """

    def __init__(self, path: Path):
        """Open, lock and read the file; a last line that a crash tore is cut off.

        Raises:
            InputError: for a line that is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.known = path.open("a+b"), {}
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another job that writes {path}", file=sys.stderr, flush=True)
            fcntl.flock(self.file, fcntl.LOCK_EX)
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        self.file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.known.setdefault(row["key"], row["text"])
            except (ValueError, TypeError, KeyError):
                self.close()
                raise InputError(
                    f"line {number} of {path} is damaged (allowed: delete the line)"
                ) from None

    def add(self, key: str, text: str) -> None:
        """Keep a paraphrase, on disk too."""
        self.known[key] = text
        self.file.write(json.dumps({"key": key, "text": text}, sort_keys=True).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Give the lock back."""
        self.file.close()
