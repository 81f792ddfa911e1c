"""Files that are whole or not there, and JSON that people can read."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locret.system.files import as_json, file_hash, folder_hash, write_whole

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a[]{},\n\\" ', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(VALUES)
def test_any_value_is_read_back(value):
    assert json.loads(as_json(value)) == value


def test_lists_of_plain_values_stand_on_one_line():
    assert (
        as_json({"a": [1, 2.5, None], "b": [[]]})
        == '{\n "a": [1, 2.5, null],\n "b": [\n  []\n ]\n}\n'
    )


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "result.json"
    write_whole(path, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: pytest.fail("full"))
    with pytest.raises(BaseException, match="full"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["result.json"]


def test_hashes_know_names_and_contents(tmp_path):
    (tmp_path / "a.bin").write_text("one")
    before = file_hash(tmp_path / "a.bin"), folder_hash(tmp_path)
    assert len(before[0]) == 16
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    assert file_hash(tmp_path / "b.bin") == before[0] and folder_hash(tmp_path) != before[1]
    (tmp_path / "b.bin").write_text("three")
    assert file_hash(tmp_path / "b.bin") != before[0]


def test_what_is_written_about_weights_is_not_in_their_hash(tmp_path):
    (tmp_path / "heads.safetensors").write_text("weights")
    (tmp_path / "config.json").write_text("{}")
    before = folder_hash(tmp_path)
    for name in ("README.md", "training.png", "training.yaml"):
        (tmp_path / name).write_text("about them")
    assert folder_hash(tmp_path) == before
    (tmp_path / "config.json").write_text('{"width": 8}')
    assert folder_hash(tmp_path) != before
