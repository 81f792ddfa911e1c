from pathlib import Path

import torch

from locret.evaluation import questions, records


def test_a_source_is_known_by_its_files(tmp_path, monkeypatch):
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "config.json").write_text("{}")
    (tmp_path / "heads.bin").write_text("x")
    assert questions.source(None) is None
    folder, file = (questions.source(str(tmp_path / name)) for name in ("heads", "heads.bin"))
    assert len(folder["sha256"]) == len(file["sha256"]) == 16 and "revision" not in folder
    fetched = tmp_path / "snapshots" / "abc123"
    (tmp_path / "heads").rename(tmp_path / "kept")
    fetched.mkdir(parents=True)
    (fetched / "config.json").write_text("{}")
    monkeypatch.setattr(questions, "snapshot_download", lambda *a, **k: str(fetched))
    found = questions.source("someone/heads")
    assert found == {"source": "someone/heads", "sha256": folder["sha256"], "revision": "abc123"}


def test_a_repository_that_is_not_here_has_no_hash(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert questions.source("nobody/nothing-of-the-kind")["sha256"] is None


def test_the_machine_and_the_versions_are_told():
    assert records.hardware(torch.device("cpu"))["device"] == "cpu"
    assert {"python", "torch", "transformers"} <= set(records.versions())


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setattr(records, "_git", lambda root, *args: None)
    assert records.commit() is None
    answers = {"rev-parse": "abc", "status": ""}
    monkeypatch.setattr(records, "_git", lambda root, *args: answers[args[0]])
    assert records.commit() == "abc"
    answers["status"] = " M file"
    assert records.commit() == "abc with changes"
    monkeypatch.undo()
    assert records._git(Path("/"), "no-such-command") is None
