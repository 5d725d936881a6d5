"""Damage between jobs: found by size at once, by hash when asked; what has no record passes."""

import pytest

from headroom import sums
from headroom.checkpoints import write_manifest
from headroom.errors import InputError
from headroom.verify import verify


@pytest.fixture
def results(tmp_path):
    root = tmp_path / "results"
    (root / "a/folder/deep").mkdir(parents=True)
    (root / "a/folder/deep/x").write_text("xxx")
    (root / "a/table.csv").write_text("1,2")
    (root / "whole").mkdir()
    (root / "whole/y").write_text("yyy")
    write_manifest(root / "whole")
    sums.record(names(root), root)
    return root


def names(root):
    return [str(root / name) for name in ("a/folder", "a/table.csv", "whole", "../outside")]


@pytest.mark.parametrize("name", ["a/folder/deep/x", "a/table.csv", "whole/y"])
def test_damage_of_files_and_folders_with_and_without_a_manifest(results, name):
    sums.check(names(results), results)
    assert verify(results) == []
    path = results / name
    text = path.read_text()
    path.write_text(text[::-1] if name == "a/table.csv" else "zzz")
    sums.check(names(results), results)  # the size is the same
    (line,) = verify(results)
    assert line.startswith(f"{path} is damaged") and "\n" not in line
    path.write_text("")
    with pytest.raises(InputError, match=f"{name} is damaged.*0 bytes, 3 were written"):
        sums.check(names(results), results)


def test_what_was_replaced_on_purpose_is_accepted_as_the_message_says(results):
    path = results / "a/table.csv"
    path.write_text("my own")
    with pytest.raises(InputError, match=r"replaced on purpose, delete .*a/table.csv instead"):
        sums.check([str(path)], results)
    (results / ".sums/a/table.csv").unlink()
    sums.check([str(path)], results)
    assert verify(results) == []


def test_a_result_that_was_deleted_is_no_damage_but_a_part_of_one_is(results):
    (results / "a/table.csv").unlink()
    assert verify(results) == []
    (results / "a/folder/deep/x").unlink()
    assert "it is missing, 3 were written" in verify(results)[0]


def test_outputs_that_are_made_anew_have_no_record(results):
    sums.forget(names(results), results)
    assert not [p for p in (results / ".sums").rglob("*") if p.is_file()]
