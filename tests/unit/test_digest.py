"""Digests of code change with what is computed and with nothing else."""

import textwrap

import pytest

from headroom.digest import code_digest, modules_of, registry_names

LIBRARY = '''
"""A module."""
from headroom.low import scale

REGISTRY = {"a": scale, "b": None}


def double(x):
    """Return twice x."""
    return scale(2, x)  # why
'''


@pytest.fixture
def tree(tmp_path):
    package = tmp_path / "src" / "headroom"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "high.py").write_text(LIBRARY)
    (package / "low.py").write_text("def scale(k, x):\n    return k * x\n")
    (package / "other.py").write_text("VALUE = 1\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        def run():
            from headroom.high import double
            return double(1)
        """)
    )
    return tmp_path, script, lambda: code_digest(script, tmp_path / "src")


def rewrite(tree, name, old, new):
    from headroom import digest

    path = tree[0] / "src" / "headroom" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    digest._parsed.cache_clear()


def test_late_and_indirect_imports_count(tree):
    root, script, _ = tree
    names = [path.name for path in modules_of(script, root / "src")]
    assert names == ["high.py", "low.py"] or names == ["__init__.py", "high.py", "low.py"]


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("high.py", "scale(2, x)", "scale(3, x)", True),
        ("low.py", "k * x", "k + x", True),
        ("high.py", "Return twice x.", "Return x doubled.", False),
        ("high.py", "# why", "# because", False),
        ("high.py", "\n\n\ndef", "\n\n\n\n\ndef", False),
        ("other.py", "1", "2", False),
    ],
)
def test_digest_follows_what_is_computed(tree, name, old, new, changes):
    digest = tree[2]
    before = digest()
    rewrite(tree, name, old, new)
    assert (digest() != before) == changes


def test_digest_does_not_depend_on_the_place(tree, tmp_path_factory):
    import shutil

    other = tmp_path_factory.mktemp("clone") / "copy"
    shutil.copytree(tree[0], other)
    assert code_digest(other / "script.py", other / "src") == tree[2]()


def test_registry_names_are_read_without_import(tree):
    assert registry_names("headroom.high", "REGISTRY", tree[0] / "src") == ("a", "b")
    flagged = 'REGISTRY = {"a": make(one=False), "b": make(two=False), "c": make(), "d": 1}\n'
    (tree[0] / "src/headroom/flagged.py").write_text(flagged)
    names = registry_names("headroom.flagged", "REGISTRY", tree[0] / "src", flag="one")
    assert names == ("b", "c", "d")
    with pytest.raises(KeyError, match="no registry"):
        registry_names("headroom.low", "REGISTRY", tree[0] / "src")
