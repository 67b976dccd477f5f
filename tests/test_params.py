"""`python -m gpt2.params` prints the values that the code reads, and starts without torch."""

import json
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from gpt2.params import main, render
from gpt2.pipeline.params import SCALES, read
from tests.closure import ROOT

VALUES = read(ROOT / "params.yaml")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text) or {}


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_is_printed_with_every_value(scale, capsys):
    main([scale])
    assert parse(capsys.readouterr().out) == VALUES[scale]


def test_the_scale_in_use_is_the_default(capsys):
    main([])
    assert parse(capsys.readouterr().out) == VALUES[VALUES["scale"]]


@pytest.mark.parametrize(("scale", "other"), [("short", "tiny"), ("full", "short"), ("tiny", "full")])
def test_the_differences_turn_one_scale_into_the_other(scale, other, capsys):
    main([scale, "--against", other])
    printed = parse(capsys.readouterr().out)
    # Keys that only the other has, such as those of another source of text, are not printed.
    common = {
        section: {key: value for key, value in values.items() if key in VALUES[scale][section]}
        for section, values in VALUES[other].items()
    }
    assert {section: {**values, **printed.get(section, {})} for section, values in common.items()} == VALUES[scale]


def test_a_difference_shows_both_values_and_equal_ones_are_left_out():
    text = render({"train": {"lr": 1.0, "steps": 2, "new": [1, "a"]}}, {"train": {"lr": 1.0, "steps": 3}}, "b")
    assert text.splitlines() == ["train:", "  steps: 2  # b: 3", '  new: [1, "a"]  # b: absent']


def test_a_section_that_is_no_map_is_refused(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(json.dumps({"scale": "tiny", "tiny": {"train": 3}}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"tiny\.train = 3 .* params\.yaml"):
        main(["tiny"])


def test_no_torch_is_imported():
    script = "import sys; from gpt2.params import main; main(['short']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True).returncode == 0
