"""A benchmark's JSON."""

import json

from benchmarks import record


def test_a_run_is_written_with_its_circumstances_and_replaced_whole(tmp_path, capsys):
    out = tmp_path / "new" / "r.json"
    record.write(out, {"a": 1}, {"b": 1}, announce=False)
    assert capsys.readouterr().out == ""
    record.write(out, {"a": 1, "out": out, "plot": None}, {"b": 2})
    written = json.loads(out.read_text())
    assert (written["settings"], written["figures"]) == ({"a": 1}, {"b": 2})
    assert written["hardware"] and written["versions"]["torch"]
    assert list(out.parent.iterdir()) == [out]
    assert str(out) in capsys.readouterr().out
