"""The pipeline as declared: exact dependencies, a closed graph, one-way layers, and files that Git ignores or keeps."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from gpt2.pipeline.files import UserError
from gpt2.pipeline.stage import SPEED
from gpt2.report.claims import judge_claims
from gpt2.report.document import TIMED_STAGES, write_report
from gpt2.report.figures import FIGURES, TIMED_FIGURES
from tests.closure import ROOT, direct_imports, import_closure, imported_packages, library_files
from tests.declared import (
    PIPELINE,
    STAGES,
    all_written,
    code_deps,
    data_deps,
    is_ignored,
    lies_in,
    module_of,
    paths,
    written,
)
from tests.invented_run import invent_run

# A module imports from its own package and from those before it.
PACKAGES = (
    *("pipeline", "data", "prepare", "model", "hellaswag", "tokenizer", "report", "huggingface", "train", "sampling"),
    *("heads", "prune", "replicates", "norm_study", "tokenizer_study", "generate", "export", "status", "params"),
    "check",
    "__main__",
)


def body_of(stage: str) -> Path:
    """The file with the work of a stage; that of `train` is imported only after torchrun has started."""
    return Path("gpt2/train/run.py") if stage == "train" else module_of(stage)


def package_of(file: Path) -> str:
    """Name of the package of a file of the library, or of the file itself."""
    return file.with_suffix("").parts[1]


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_of_a_stage_cover_what_it_imports_and_nothing_else(stage):
    # `import gpt2.x.y` runs the packages' __init__ too; they stay empty.
    closure = {file for file in import_closure(module_of(stage)) if file.name != "__init__.py"}
    declared = code_deps(stage)
    assert {file.as_posix() for file in closure if not any(lies_in(file.as_posix(), dep) for dep in declared)} == set()
    assert {dep for dep in declared if not any(lies_in(file.as_posix(), dep) for file in closure)} == set()
    assert len(declared) <= 10
    deps = STAGES[stage]["deps"]
    assert deps == [dep for dep in deps if dep not in declared] + [dep for dep in deps if dep in declared], "data first"


def test_training_depends_on_nothing_that_prepares_analyses_or_reports():
    packages = {package_of(Path(dep)) for dep in code_deps("train") if dep.startswith("gpt2/")}
    assert packages == {"pipeline", "data", "model", "train", "hellaswag", "huggingface"}


def test_every_folder_of_code_is_a_package_with_an_empty_init():
    folders = {path.parent for name in ("gpt2", "stages", "tests", "tools") for path in (ROOT / name).rglob("*.py")}
    assert len(folders) > 15
    assert [folder for folder in folders if (folder / "__init__.py").read_bytes()] == []


def test_stages_modules_and_commands_have_the_same_names():
    modules = {path.relative_to(ROOT) for path in (ROOT / "stages").glob("*.py")} - {Path("stages/__init__.py")}
    assert modules == {module_of(stage) for stage in STAGES}
    for stage in STAGES:
        assert re.search(rf"-m stages\.{module_of(stage).stem}$", STAGES[stage]["cmd"])
        names = [
            node.args[0].value
            for file in import_closure(module_of(stage))
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
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
        for name, value in vars(import_module(".".join(body_of(stage).with_suffix("").parts))).items()
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
        for node in ast.walk(ast.parse((ROOT / body_of(stage)).read_text(encoding="utf-8")))
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

    def write(settings: dict) -> str:
        own = type(results)(tmp_path, results.norm, results.scale, settings)
        return write_report(own, judge_claims(own), links)

    text = write(settings)
    assert f"norm `{results.norm}`" in text and f"scale `{results.scale}`" in text
    for section in sections:
        fewer = {name: values for name, values in settings.items() if name != section}
        with pytest.raises((UserError, KeyError), match=section):
            write(fewer)


def test_the_report_lists_the_times_of_every_stage_but_its_own_and_the_check():
    assert set(TIMED_STAGES) == {module_of(stage).stem for stage in STAGES} - {"check_params", "report"}


def test_every_package_has_a_place_in_the_order():
    assert {package_of(file) for file in library_files()} == set(PACKAGES)


def test_imports_point_downward_only():
    upward = [
        f"{file} imports {imported}"
        for file in sorted(library_files())
        for imported in direct_imports(file)
        if imported.parts[0] == "stages" or PACKAGES.index(package_of(imported)) > PACKAGES.index(package_of(file))
    ]
    assert upward == []


def test_no_module_imports_itself_in_a_circle():
    graph = {file: direct_imports(file) for file in library_files()}
    # static_order raises CycleError, which names the circle.
    assert set(TopologicalSorter(graph).static_order()) == library_files()


def test_a_name_means_one_thing_in_the_library():
    places: dict[str, list[str]] = {}
    for file in library_files():
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(file.as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1 and name != "main"} == {}


def test_stages_of_text_and_the_report_import_no_torch():
    modules = ", ".join(f"stages.{stage}" for stage in ("prepare", "benchmark", "tokenize", "report"))
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
