"""Files of results: equal work gives equal bytes."""

import numpy as np
import pytest

from headroom.corpora.tokens import Stream, load_stream, save_stream
from headroom.heads.store import load_variants, save_similarity

STREAM = Stream(np.arange(4, dtype=np.int32), np.zeros(4, dtype=np.int32), "bos", 0)
NOTES = {"tokens": 256, "sequences": 8, "window": 32, "metric": "relu"}
SAVED = {
    "tokens": lambda path: save_stream(STREAM, path),
    "similarity": lambda path: save_similarity(path, {"similarity": np.eye(2)[None]}, 2, NOTES),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_file_is_the_same_each_time_it_is_written(kind, tmp_path):
    path, found = tmp_path / "file", set()
    for _ in range(20):
        SAVED[kind](path)
        found.add(path.read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("token", [0, None])
def test_notes_come_back(token, tmp_path):
    save_stream(Stream(STREAM.tokens, STREAM.documents, "none", token), tmp_path / "file")
    found = load_stream(tmp_path / "file")
    assert (found.boundary, found.boundary_token) == ("none", token)
    SAVED["similarity"](tmp_path / "other")
    assert load_variants(tmp_path / "other")[1] == 2
