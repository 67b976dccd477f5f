"""Scratch: one folder for each run, held by one process, and moved into place as a whole."""

from pathlib import Path

import pytest

from gpt2.files import UserError
from gpt2.scratch import drop, locked, scratch_folder


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
        with pytest.raises(UserError, match=rf"another run of this configuration holds {folder}; wait"), locked(folder):
            pass
        raise KeyError
    with locked(folder):
        drop(folder)
        assert not folder.exists()
    with locked(folder):
        assert folder.is_dir()
