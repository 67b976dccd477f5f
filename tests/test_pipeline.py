"""The pipeline as declared: exact dependencies, a closed graph, one-way layers, and files that Git ignores or keeps."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from gpt2.figures import FIGURES, TIMED_FIGURES
from gpt2.files import UserError
from gpt2.params import SCALES
from gpt2.report import TIMED_STAGES, write_report
from gpt2.schema import SECTIONS
from gpt2.stage import SPEED
from tests.closure import ROOT, direct_imports, import_closure, imported_packages
from tests.invented_run import invent_run
from tests.pipeline import (
    PIPELINE,
    STAGES,
    all_written,
    data_deps,
    is_ignored,
    lies_in,
    load_yaml,
    module_of,
    paths,
    written,
)

# A module imports from its own layer and from those before it.
LAYERS = {
    "leaf": "files params stage hardware shape dist shards loss loss_kernel stability interrupt heartbeat rows "
    "markup machine units scratch workers recorded decode_kernels draw_kernels",
    "core": "model cache sampling layers weights pretrained checkpoint optim data windows tokenizer items corpus "
    "docstrings sources encode dedup hub vocabulary",
    "loops": "prepare benchmark tokenize contamination bpe words tokenizer_study evaluate scoring train "
    "train_results norm_study generate card export heads redundancy criteria prune prunability repair frontier "
    "circuits nulls iterative similar_orders intervals costs chance mcnemar pruned_scores pruned_speed recovery "
    "short_runs vocabulary_runs",
    "whole": "schema volume workload forecast storage preflight check",
    "report": "hellaswag results measures claims studies figures report plots_page status vocabulary_section",
}
HEIGHTS = {module: height for height, modules in enumerate(LAYERS.values()) for module in modules.split()}
TEXT_STAGES = ("prepare", "benchmark", "tokenize")


def parse_stage(stage: str) -> ast.Module:
    return ast.parse((ROOT / module_of(stage)).read_text(encoding="utf-8"))


def library_modules() -> set[str]:
    return {path.stem for path in (ROOT / "gpt2").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_of_a_stage_are_what_it_imports(stage):
    # `import gpt2.x` runs the package's __init__ too; it stays empty, so that no stage depends on it.
    expected = {file.as_posix() for file in import_closure(module_of(stage)) if file.name != "__init__.py"}
    declared = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert declared == expected, (
        f"dvc.yaml, {stage}: add {sorted(expected - declared)}, remove {sorted(declared - expected)}"
    )
    assert STAGES[stage]["deps"] == [*sorted(declared), *sorted(data_deps(stage))]


def test_package_files_are_empty():
    assert [name for name in ("gpt2", "stages", "tests") if (ROOT / name / "__init__.py").read_bytes()] == []


def test_stages_modules_and_commands_have_the_same_names():
    modules = {path.relative_to(ROOT) for path in (ROOT / "stages").glob("*.py")} - {Path("stages/__init__.py")}
    assert modules == {module_of(stage) for stage in STAGES}
    for stage in STAGES:
        assert re.search(rf"-m stages\.{module_of(stage).stem}$", STAGES[stage]["cmd"])
        names = [
            node.args[0].value
            for node in ast.walk(parse_stage(stage))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Stage"
        ]
        assert names == [stage]
        assert (SPEED / f"{module_of(stage).stem}.json").as_posix() in paths(STAGES[stage]["metrics"])


def test_every_input_is_made_by_exactly_one_other_stage():
    makers = {path: [stage for stage in STAGES if path in written(stage)] for path in all_written()}
    assert {path: stages for path, stages in makers.items() if len(stages) != 1} == {}
    for stage in STAGES:
        assert {dep for dep in data_deps(stage) if dep not in makers or makers[dep] == [stage]} == set()


def test_every_stage_waits_for_valid_parameters():
    graph = {stage: {maker for maker in STAGES if data_deps(stage) & written(maker).keys()} for stage in STAGES}
    order = list(TopologicalSorter(graph).static_order())
    assert order[0] == "check-params"
    assert [stage for stage in order[1:] if not graph[stage]] == []


@pytest.mark.parametrize("stage", STAGES)
def test_paths_in_the_code_are_the_declared_ones(stage):
    constants = {
        value.as_posix()
        for name, value in vars(import_module(f"stages.{module_of(stage).stem}")).items()
        if name.isupper() and isinstance(value, Path) and value != Path(".")
    }
    declared = data_deps(stage) | written(stage).keys()
    assert {path for path in constants if not any(lies_in(path, place) for place in declared)} == set()
    # The frame of a stage writes its times; prepare waits for valid parameters without reading the file; what the
    # report reads is compared with its deps by running it (test_end_to_end.py).
    elsewhere = {(SPEED / f"{module_of(stage).stem}.json").as_posix(), "data/params.valid"}
    elsewhere = elsewhere | data_deps(stage) if stage == "report" else elsewhere - {*constants}
    assert {place for place in declared - elsewhere if not any(lies_in(path, place) for path in constants)} == set()


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("check-params", "report")])
def test_params_of_a_stage_are_the_sections_it_loads(stage):
    calls = [
        (node.func.attr, node.args[0].value)
        for node in ast.walk(parse_stage(stage))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "top")
        if getattr(node.func.value, "id", "") == "stage"
    ]
    read = {key if attr == "top" else f"${{scale}}.{key}" for attr, key in calls}
    assert "${scale}.hardware" not in STAGES[stage]["params"], "hardware changes the time alone"
    assert set(STAGES[stage]["params"]) == read - {"${scale}.hardware"}


def test_check_params_depends_on_the_whole_file():
    assert STAGES["check-params"]["params"] == [{"params.yaml": None}]


def test_the_report_needs_every_section_it_declares_and_no_other(tmp_path):
    results = invent_run(tmp_path)
    links = dict.fromkeys(FIGURES | TIMED_FIGURES, "figure.png")
    declared = set(STAGES["report"]["params"])
    sections = {param.removeprefix("${scale}.") for param in declared - {"norm", "scale"}}
    assert declared == {"norm", "scale"} | {f"${{scale}}.{section}" for section in sections}
    settings = {section: results.settings[section] for section in sections}
    text = write_report(type(results)(tmp_path, results.norm, results.scale, settings), links)
    assert f"norm `{results.norm}`" in text and f"scale `{results.scale}`" in text
    for section in sections:
        fewer = {name: values for name, values in settings.items() if name != section}
        with pytest.raises((UserError, KeyError), match=section):
            write_report(type(results)(tmp_path, results.norm, results.scale, fewer), links)


def test_the_report_lists_the_times_of_every_stage_but_its_own_and_the_check():
    assert set(TIMED_STAGES) == {module_of(stage).stem for stage in STAGES} - {"check_params", "report"}


def test_every_scale_has_every_section():
    values = load_yaml("params.yaml")
    for scale in SCALES:
        assert values[scale].keys() == SECTIONS.keys()


def test_every_module_of_the_library_has_a_layer():
    assert library_modules() == HEIGHTS.keys()
    assert sum(len(modules.split()) for modules in LAYERS.values()) == len(HEIGHTS), "a module is in two layers"


def test_imports_point_downward_only():
    upward = [
        f"{module} imports {imported.stem}"
        for module in sorted(HEIGHTS)
        for imported in direct_imports(Path("gpt2", f"{module}.py"))
        if imported.parts[0] == "stages" or HEIGHTS[imported.stem] > HEIGHTS[module]
    ]
    assert upward == []


def test_no_module_imports_itself_in_a_circle():
    graph = {
        module: {file.stem for file in direct_imports(Path("gpt2", f"{module}.py"))} for module in library_modules()
    }
    # static_order raises CycleError, which names the circle.
    assert set(TopologicalSorter(graph).static_order()) == library_modules()


@pytest.mark.parametrize("stage", [*TEXT_STAGES, "report"])
def test_stages_of_text_and_the_report_import_no_torch(stage):
    files = import_closure(module_of(stage))
    assert [file for file in files if "torch" in imported_packages([file])] == []


def test_nothing_that_stages_of_text_import_brings_torch_along():
    modules = ", ".join(f"stages.{module_of(stage).stem}" for stage in TEXT_STAGES)
    code = f"import sys, {modules}; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_only_the_report_draws():
    closures = {stage: imported_packages(import_closure(module_of(stage))) for stage in STAGES}
    assert [stage for stage, imports in closures.items() if "matplotlib" in imports] == ["report"]


@pytest.mark.parametrize("stage", STAGES)
def test_outs_are_ignored_by_git_unless_they_are_meant_for_it(stage):
    for path, options in written(stage).items():
        # A folder that does not exist yet is known as one by its slash alone.
        place = path if Path(path).suffix else f"{path}/"
        assert is_ignored(place) == options.get("cache", True), f"{place}: see .gitignore and dvc.yaml"


def test_metrics_are_kept_in_git_and_curves_are_drawn_once():
    for stage in STAGES:
        assert all(options == {"cache": False} for options in paths(STAGES[stage]["metrics"]).values())
        assert "plots" not in STAGES[stage], "a curve declared here and at the top is drawn twice"


def test_plots_are_drawn_from_outs_with_a_named_x():
    outs = {path for stage in STAGES for path in paths(STAGES[stage]["outs"])}
    for entry in PIPELINE["plots"]:
        for title, plot in entry.items():
            assert isinstance(plot["x"], str), f"{title}: without x, DVC overwrites the column step"
            assert {file for file in plot["y"] if not any(lies_in(file, out) for out in outs)} == set()
