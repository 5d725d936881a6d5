"""Questions about documented objects of installed packages, answered by their documentation."""

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from headroom.corpora.documentation import (
    DENSITY,
    LETTERS,
    MARK,
    WORD,
    check_version,
    clean,
    package_files,
)
from headroom.errors import InputError

CHARACTERS = 400  # of an answer, where the configuration says nothing
MINIMUM = 80  # characters; a shorter answer is a label
PER_FILE = 2  # objects of a file that come before those of other files run out
DEFINED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(`*]?[A-Z0-9`])")
# What follows the prose of a docstring: a section, a list, a directive, a table, a block of code.
NO_PROSE = re.compile(
    r"^\s|^(?:[-*+|>=~#@]|\.\. |:\w+|\d+[.)] )|^[-=~^*+`]{3,}\s*$|^[A-Z]\w*(?: \w+)?:\s*$", re.M
)


def questions(settings: Mapping, key: str) -> Iterator[tuple[str, str, str]]:
    """Yield (id, prompt, answer) of documented objects; no prompt and no answer comes twice.

    Files are parsed one by one in the order of a hash of their names, so that any number of first
    samples is a mixture of the packages and costs no more files than it takes. The id is the
    qualified name; private names and tests are left out. The name ``python`` stands for the
    language reference in ``pydoc_data``, which comes first.

    Args:
        settings: ``packages`` (import names), ``versions`` that must be installed, ``characters``
            an answer has at most.
        key: the configuration key that messages name.

    Raises:
        InputError: for a package that is not installed or has another version.
    """
    packages = settings["packages"]
    for package in packages:
        check_version(package, settings.get("versions", {}).get(package), key)
    longest, prompts, answers = settings.get("characters", CHARACTERS), set(), set()
    for identity, prompt, docstring in _documented(packages, key):
        answer = _prose_of(docstring, longest)
        if answer and prompt not in prompts and answer not in answers:
            prompts.add(prompt)
            answers.add(answer)
            yield identity, prompt, answer


def _documented(packages: Sequence[str], key: str) -> Iterator[tuple[str, str, str]]:
    """Yield (id, prompt, documentation), the language's topics first."""
    if "python" in packages:
        for topic, content in _topics(key):
            prompt = f"What does Python's documentation say about {topic}?"
            yield f"python.{topic}", prompt, content.partition("\n\n")[2]  # without its title
    files = sorted(
        (_digest(f"{package}/{name}"), f"{package}/{name}", path)
        for package in packages
        if package != "python"
        for name, path in package_files(package, key)
        if "/_" not in f"/{name}".replace("/__init__.py", "/")
    )
    later: list[tuple[str, str, str]] = []
    for _, name, path in files:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found = sorted(_objects(path, module), key=lambda item: _digest(item[0]))
        made = [(item, f"What does {item} do?", docstring) for item, docstring in found]
        yield from made[:PER_FILE]
        later += made[PER_FILE:]
    yield from later


def _topics(key: str) -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            f"config key {key}: this Python comes without pydoc_data (leave out python)"
        ) from None
    return sorted(topics.items(), key=lambda item: _digest(item[0]))


def _objects(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield qualified name and docstring of the public classes, functions and methods of a file."""
    source = path.read_bytes()
    if sum(map(len, source.split(b'"""')[1::2])) < DENSITY * len(source):
        return  # as documentation does: parsing takes the time, so it goes where the prose is
    try:
        queue: list[tuple[str, ast.AST]] = [(module, ast.parse(source))]
    except (SyntaxError, ValueError):
        return
    for prefix, node in queue:
        for child in node.body:
            if isinstance(child, DEFINED) and not child.name.startswith("_"):
                name, docstring = f"{prefix}.{child.name}", ast.get_docstring(child)
                if docstring:
                    yield name, docstring
                if isinstance(child, ast.ClassDef):
                    queue.append((name, child))


def _prose_of(docstring: str, longest: int) -> str:
    """Return the first whole sentences of documentation's prose; "" where there is too little.

    Args:
        docstring: as it stands in the source.
        longest: characters at most.
    """
    answer = ""
    for paragraph in clean(docstring).split("\n\n"):
        if NO_PROSE.search(paragraph):
            break
        for number, sentence in enumerate(SENTENCE_END.split(" ".join(paragraph.split()))):
            longer = f"{answer}{' ' if number else chr(10) * 2}{sentence}" if answer else sentence
            if len(longer) > longest or not sentence.endswith((".", "!", "?")):
                return answer if _is_prose(answer) else ""
            answer = longer
    return answer if _is_prose(answer) else ""


def _is_prose(answer: str) -> bool:
    letters, marks = (sum(map(len, kind.findall(answer))) for kind in (WORD, MARK))
    return len(answer) >= MINIMUM and letters >= LETTERS * marks


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
