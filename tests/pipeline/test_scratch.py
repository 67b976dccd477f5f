"""Scratch: one folder for each run, held by one process, and moved into place as a whole."""

import errno
import os
from pathlib import Path

import pytest

from gpt2.pipeline.files import UserError
from gpt2.pipeline.scratch import drop, locked, scratch_folder, staged


def test_the_folder_is_one_for_each_identity_and_code(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    source = tmp_path / "code.py"
    source.write_text("first = 1\n")
    folder = scratch_folder("train", {"lr": 0.1, "seed": 1}, [source])
    assert folder.parent == Path(".scratch/train")
    assert scratch_folder("train", {"seed": 1, "lr": 0.1}, [source]) == folder
    assert scratch_folder("train", {"lr": 0.1, "seed": 2}, [source]) != folder
    assert scratch_folder("other", {"lr": 0.1, "seed": 1}, [source]) != folder
    # DVC runs queued experiments in a copy of the repository and names the original.
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert scratch_folder("train", {"lr": 0.1, "seed": 1}, [source]) == tmp_path / folder
    monkeypatch.delenv("DVC_ROOT")
    source.write_text("first = 2\n")
    assert scratch_folder("train", {"lr": 0.1, "seed": 1}, [source]) != folder


def test_a_held_folder_is_refused_until_it_is_let_go(tmp_path):
    folder = tmp_path / "scratch"
    with pytest.raises(KeyError), locked(folder):
        for second in (locked(folder), staged(tmp_path / "tokens", folder)):
            with pytest.raises(UserError, match=rf"another run of this configuration holds {folder}; wait"), second:
                pass
        raise KeyError
    with locked(folder):
        drop(folder)
        assert not folder.exists()
    with locked(folder):
        assert folder.is_dir()


def test_what_is_staged_replaces_the_target_as_a_whole(tmp_path):
    target, scratch = tmp_path / "data" / "tokens", tmp_path / "scratch" / "one"
    target.mkdir(parents=True)
    (target / "stale").write_text("of another run")
    with staged(target, scratch) as folder:
        (folder / "new").write_text("new")
        assert (target / "stale").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(scratch.parent.iterdir()) == []


def test_a_failed_run_leaves_whole_files_and_the_target_as_it_was(tmp_path):
    target, scratch = tmp_path / "tokens", tmp_path / "scratch" / "one"
    with pytest.raises(KeyError), staged(target, scratch) as folder:
        (folder / "whole").write_text("done")
        (folder / ".half.17.tmp").write_text("do")
        (scratch / ".record.json.17.tmp").write_text("{")
        raise KeyError
    assert not target.exists()
    with staged(target, scratch) as folder:
        assert [path.name for path in folder.iterdir()] == ["whole"]
        assert sorted(path.name for path in scratch.iterdir()) == ["lock", "tokens"]
    assert (target / "whole").read_text() == "done"


def test_what_another_configuration_left_goes_unless_a_run_holds_it(tmp_path):
    abandoned, held = tmp_path / "scratch" / "abandoned", tmp_path / "scratch" / "held"
    for folder in (abandoned, held):
        (folder / "tokens").mkdir(parents=True)
    with locked(held), staged(tmp_path / "tokens", tmp_path / "scratch" / "one"):
        assert not abandoned.exists()
        assert (held / "tokens").is_dir()


def test_a_target_on_another_file_system_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuse)
    with staged(tmp_path / "tokens", tmp_path / "scratch" / "one") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "tokens" / "new").read_text() == "new"
    assert list((tmp_path / "scratch").iterdir()) == []
