"""The README's numbers are those of the committed run.

Metrics are read from Git's index: a run on another kind of processor changes the files, but not what README describes.
"""

import json
import re
import subprocess

import pytest

from tests.closure import ROOT

# | what | figure, or mean ± deviation (models) | `metrics/file.json: key` |
ROW = re.compile(
    r"^\|[^|]*\| *([-+,.\d]+)(?: ± ([.\d]+) \((\d+)\))?[^|]*\| *`(metrics/[\w/]+\.json): (\w+)` *\|$", re.MULTILINE
)


def cited_figures() -> list[tuple[str, str, str, str, str]]:
    return ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_table_of_results_cites_metrics():
    assert len(cited_figures()) >= 8


@pytest.mark.parametrize(("shown", "deviation", "models", "file", "key"), cited_figures())
def test_a_number_of_the_readme_is_the_metric_that_it_cites(shown, deviation, models, file, key):
    committed = subprocess.run(["git", "show", f":{file}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    measured = json.loads(committed)
    decimals = len(shown.partition(".")[2])
    assert f"{measured[key]:,.{decimals}f}" == shown.lstrip("+")
    if key.endswith("_mean"):
        assert f"{measured[key.replace('_mean', '_sd')]:,.{decimals}f}" == deviation
        assert str(measured["models"]) == models
