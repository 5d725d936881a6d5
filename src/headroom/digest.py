"""What can be known of the code without running it: digests and the names in a registry."""

import ast
import hashlib
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1]
IGNORED = ("kind", "ctx", "type_params", "type_comment")


def canonical(node: object) -> object:
    """Return a syntax tree as nested lists that are equal on every Python version.

    ``ast.dump`` differs between versions, because fields come and go; here a node is its type's
    name and its non-empty fields, docstrings left out.
    """
    if isinstance(node, list):
        return [canonical(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    parts: list[object] = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name in IGNORED or value is None or value == []:
            continue
        if name == "body" and isinstance(value, list):
            value = [item for item in value if not _is_docstring(item)]
        parts.append([name, canonical(value)])
    return parts


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@cache
def _parsed(path: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of one file and the headroom modules that it imports anywhere, late ones too."""
    tree = ast.parse(path.read_text())
    digest = hashlib.sha256(repr(canonical(tree)).encode()).hexdigest()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return digest, tuple(sorted(name for name in names if name.split(".")[0] == "headroom"))


def _module_file(name: str, source: Path) -> Path | None:
    path = source.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None  # an attribute of a module, not a module


def modules_of(script: Path, source: Path = SOURCE) -> list[Path]:
    """Return the headroom files that a script imports, directly or not, sorted."""
    found: set[Path] = set()
    queue = [script]
    while queue:
        for name in _parsed(queue.pop())[1]:
            path = _module_file(name, source)
            if path is not None and path not in found:
                found.add(path)
                queue.append(path)
    return sorted(found)


def code_digest(script: Path, source: Path = SOURCE) -> str:
    """Return one digest of a script and of every headroom module that it imports.

    Changes with a formula, not with a docstring, a comment, a time stamp or the clone's place.
    """
    parts = [("script", _parsed(script)[0])]
    parts += [
        (path.relative_to(source).as_posix(), _parsed(path)[0])
        for path in modules_of(script, source)
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@cache
def registry_names(
    module: str, variable: str, source: Path = SOURCE, flag: str = ""
) -> tuple[str, ...]:
    """Return the keys of a registry (a dict literal at module level) without importing it.

    The grammar of recipes and the configuration need the names, not torch.

    Args:
        module, variable: where the registry is.
        source: folder of the package.
        flag: leave out the entries that are made with ``{flag}=False``.

    Raises:
        KeyError: if the module assigns no dict of that name.
    """
    path = source.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == variable for target in targets)
        if named and isinstance(getattr(node, "value", None), ast.Dict):
            entries = zip(node.value.keys, node.value.values, strict=True)
            return tuple(ast.literal_eval(key) for key, made in entries if not _off(made, flag))
    raise KeyError(f"{module} has no registry {variable}")


def _off(made: ast.expr, flag: str) -> bool:
    """Whether a call says ``flag=False``."""
    return isinstance(made, ast.Call) and any(
        keyword.arg == flag
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is False
        for keyword in made.keywords
    )
