"""English text without a download: the documentation inside installed Python packages.

Files are parsed, never imported, so nothing of theirs runs and torch costs no import.
"""

import ast
import hashlib
import importlib.util
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from headroom.errors import InputError

MINIMUM = 200  # characters; shorter docstrings are labels ("Returns the name."), not prose
DENSITY = 0.2  # least share of a file's bytes between triple quotes
LETTERS = 0.6  # least share of letters; below lie tables, signatures and ASCII art
DOCTEST = re.compile(r"^[ \t]*>>>.*(?:\n[ \t]*\S.*)*\n?", re.MULTILINE)
WORD, MARK = re.compile(r"[^\W\d_]+"), re.compile(r"\S+")
FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*\n?", re.MULTILINE | re.DOTALL)
BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
TESTS = re.compile(r"(^|[/_])(tests?|testing|_internal|conftest)[/_.]")  # notes to developers
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documentation(packages: list[str], versions: dict[str, str], key: str) -> Iterator[str]:
    """Yield cleaned documentation texts in an order that depends on the packages alone.

    Files of all packages are read in the order of a hash of their names, so that any number of
    first texts is a mixture of the packages. The name ``python`` stands for the language reference
    in ``pydoc_data``, which comes first.

    Args:
        packages: import names.
        versions: what must be installed; ``python`` as ``3.11``. A package left out goes unchecked.
        key: the configuration key that messages name.

    Raises:
        InputError: for a package that is not installed or has another version.
    """
    for package in packages:
        check_version(package, versions.get(package), key)
    if "python" in packages:
        for topic in _python_topics(key):
            yield from _prose(topic)
    files = [
        (hashlib.sha256(f"{package}/{name}".encode()).digest(), path)
        for package in packages
        if package != "python"
        for name, path in package_files(package, key)
    ]
    for _, path in sorted(files):
        for docstring in docstrings(path):
            yield from _prose(docstring)


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a source file, outermost first; none if it has little prose."""
    source = path.read_bytes()
    if sum(map(len, source.split(b'"""')[1::2])) < DENSITY * len(source):
        return  # parsing is what takes the time, so it goes where the prose is
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # packages ship templates and test files that are no Python
    for node in _documented(tree):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring


def clean(text: str) -> str:
    """Return the prose of a docstring: dedented, without examples of code, single blank lines."""
    text = inspect.cleandoc(text)
    text = DOCTEST.sub("", FENCE.sub("", text))  # fences first: they may hold doctests
    return BLANK_LINES.sub("\n\n", text).strip()


def _documented(node: ast.AST) -> Iterator[ast.AST]:
    # Statements alone can hold definitions: walking into expressions too takes twice as long.
    if isinstance(node, DOCUMENTED):
        yield node
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()) if not isinstance(node, ast.Lambda) else ():
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _documented(child)


def _prose(text: str) -> Iterator[str]:
    text = clean(text)
    if len(text) >= MINIMUM:
        letters, marks = (sum(map(len, kind.findall(text))) for kind in (WORD, MARK))
        if letters >= LETTERS * marks:
            yield text


def _python_topics(key: str) -> Iterator[str]:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise InputError(
            f"config key {key}: this Python comes without pydoc_data (leave out python)"
        )
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign):
            yield from ast.literal_eval(node.value).values()


def check_version(package: str, wanted: str | None, key: str) -> None:
    """Refuse a package that is not installed in the wanted version; None stands for any.

    Raises:
        InputError: naming the key and both versions.
    """
    found = installed_version(package, key)
    if wanted is not None and found != wanted:
        raise InputError(
            f"config key {key}: {package} {wanted} is asked for, {found} is installed "
            f"(other documentation would be another corpus)"
        )


def installed_version(package: str, key: str) -> str:
    """Return the version of an installed package; of ``python`` the first two numbers.

    Raises:
        InputError: if it is not installed.
    """
    if package == "python":
        return ".".join(platform.python_version_tuple()[:2])
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        owners = metadata.packages_distributions().get(package)  # yaml is of PyYAML
        if owners:
            return metadata.version(owners[0])
        raise InputError(f"config key {key}: package {package} is not installed") from None


def package_files(package: str, key: str) -> Iterator[tuple[str, Path]]:
    """Yield name inside the package and path of each source file but the tests, unordered.

    Raises:
        InputError: if there is no package of that import name.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise InputError(f"config key {key}: package {package} is not installed (import names)")
    for root in spec.submodule_search_locations or ():
        for path in Path(root).rglob("*.py"):
            name = path.relative_to(root).as_posix()
            if not TESTS.search(name):
                yield name, path
