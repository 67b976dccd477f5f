"""Every stage in the order of the pipeline, on documentation of the standard library and with minuscule settings."""

import ast
import csv
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.model.weights import save_model
from gpt2.pipeline.files import read_json
from gpt2.pipeline.params import SCALES
from tests.analysed import make_model
from tests.declared import PIPELINE, STAGES, all_written, data_deps, lies_in, load_yaml, module_of, written
from tests.settings import HARDWARE

SOURCE_BYTES = 400_000
CHANGED = {
    "hardware": HARDWARE,
    "benchmark": {"items": 100, "context_words": 6, "ending_words": 4, "max_per_document": None},
    "tokenize": {"encoding": "gpt2", "shard_tokens": 20_000},
    "tokenizer_study": {
        "vocab_sizes": [300, 400], "held_out_bytes": 50_000, "n_examples": 6,
        "rare_max_count": 5, "compound_part_min_count": 3, "technical_min_count": 5, "technical_min_residual_idf": 1.0,
    },
    "vocabulary_runs": {
        "budgets": [4e8, 5e8], "seeds": [1], "max_lrs": [1e-3], "batch_windows": 2, "n_layer": 1, "n_embd": 8,
        "block_size": 16, "text_bytes": 50_000,
    },
    "model": {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 32},
    "norm_study": {
        "max_steps": 3, "batch_windows": 4, "micro_batch": 2, "n_layer": 2, "n_head": 2, "n_embd": 16,
        "block_size": 16, "train_tokens": 2000, "eval_tokens": 320, "vocab_size": 300,
        "arms": {
            "main": {"optimizer": "adamw", "tied": True, "max_lrs": [1e-3], "warmup_steps": [1], "seeds": [1]},
            "muon": {"optimizer": "muon", "tied": False, "max_lrs": [1e-3], "warmup_steps": [1], "seeds": [1]},
        },
    },
    "train": {
        "max_steps": 6, "tokens_per_step": 256, "micro_batch": 4, "max_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2,
        "eval_interval": 3, "checkpoint_interval": 3, "log_interval": 2, "eval_tokens": 640, "eval_items": 20,
    },
    "generate": {"prompts": ["Return the ", "A "], "max_tokens": 4, "num_seq": 2},
    "heads": {"n_tokens": 320, "batch_size": 4},
    "prune": {"shares": [0.25, 0.5], "random_seeds": [1, 2], "random_sets": 3, "calibration_tokens": 320,
              "scoring_tokens": 320, "selection_tokens": 320, "eval_tokens": 320, "batch_size": 4},
    "replicates": {"seeds": [2, 3]},
}  # fmt: skip
# The shipped scale tiny, made smaller still, on another source.
SETTINGS = {section: {**keys, **CHANGED.get(section, {})} for section, keys in load_yaml("params.yaml")["tiny"].items()}
SETTINGS["prepare"] = {"source": "files", "path": "source", "min_chars": 200, "val_percent": 15.0, "test_percent": 25.0}
# The keys that design and report rely on.
KEYS = {
    "tokens": "tokens_train tokens_val tokens_test bytes_per_token encoding",
    "train": "steps tokens_seen train_loss val_loss val_perplexity val_bits_per_byte hellaswag_acc_norm max_grad_norm "
    "loss_spikes diverged diverged_at_step unigram_entropy stalled",
    "hellaswag": "items "
    + " ".join(f"{kind}_{acc}" for kind in ("completion", "harness") for acc in ("acc", "acc_norm", "acc_norm_stderr")),
    "heads": "heads threshold redundant_pairs redundant_heads max_similarity mean_similarity untrained_mean_similarity",
    "prune": "baseline_perplexity max_pruned_percent_below_5 redundancy_merge_refit_max_pruned_percent_below_5 "
    + " ".join(
        f"{criterion}perplexity_rise_percent_at_15"
        for criterion in ("", "taylor_", "magnitude_", "random_", "redundancy_refit_")
    ),
    "replicates": "models train_val_loss_mean train_val_loss_sd prune_perplexity_rise_percent_at_15_mean",
    "norm_study": " ".join(
        f"{norm}_{key}"
        for norm in ("preln", "postln", "deepnorm")
        for key in ("val_loss", "loss_spikes", "diverged", "diverged_at_step", "stalled", "max_grad_norm")
    ),
    "tokenizer": " ".join(
        f"{name}_{key}"
        for name in ("gpt2", "bpe_300", "bpe_400")
        for key in (
            *("bytes_per_token", "bits_per_byte", "rare_bits_per_byte"),
            *(f"{kind}tokens_per_word" for kind in ("", "rare_", "compound_", "technical_")),
        )
    ),
    "speed/train": "tokens_per_s data_wait_percent seconds peak_memory_gib processes",
    **{f"speed/{module_of(stage).stem}": "seconds" for stage in STAGES if stage != "train"},
}


def read_docstrings() -> Iterator[str]:
    """Docstrings of the standard library's modules, classes and functions, SOURCE_BYTES of them."""
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                total += len(text)
                yield text
        if total > SOURCE_BYTES:
            return


def write_source(folder: Path) -> None:
    """Half the documents as JSON lines, half as Parquet."""
    folder.mkdir(parents=True)
    texts = list(read_docstrings())
    half = len(texts) // 2
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:half])
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.table({"text": texts[half:]}), folder / "b.parquet")


def write_params(folder: Path, **changed: dict) -> None:
    settings = {name: {**section, **changed.get(name, {})} for name, section in SETTINGS.items()}
    # JSON is YAML.
    values = {"norm": "preln", "scale": "tiny", **dict.fromkeys(SCALES, settings)}
    (folder / "params.yaml").write_text(json.dumps(values), encoding="utf-8")


class OpenedFiles:
    """Files below a folder that Python code opens, by the stage that is running."""

    def __init__(self):
        self.folder, self.stage = Path("."), ""
        self.paths: dict[str, set[str]] = {}
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        # A hook cannot be removed; outside a stage it does nothing.
        if self.stage and event == "open" and isinstance(arguments[0], str | os.PathLike):
            path = Path(os.path.abspath(arguments[0]))
            if path.is_relative_to(self.folder):
                self.paths.setdefault(self.stage, set()).add(path.relative_to(self.folder).as_posix())


@pytest.fixture(scope="module")
def opened() -> OpenedFiles:
    return OpenedFiles()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, opened) -> Iterator[Path]:
    """A folder in which every stage has run, in the order of dvc.yaml, which is that of the graph."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_source(folder / "source")
    write_params(folder)
    opened.folder = folder
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("DVC_ROOT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        for stage in STAGES:
            opened.stage = stage
            import_module(f"stages.{module_of(stage).stem}").main()
            opened.stage = ""
        yield folder


def read_columns(path: Path) -> list[str]:
    with open(path, encoding="utf-8", newline="") as lines:
        return next(csv.reader(lines))


@pytest.mark.parametrize("stage", STAGES)
def test_every_declared_result_is_written(finished, stage):
    for path in written(stage):
        place = finished / path
        assert place.is_file() or any(place.iterdir()), path


def test_nothing_else_is_written(finished):
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    files -= {"params.yaml", "source/a.jsonl", "source/b.parquet"}
    assert {file for file in files if not any(lies_in(file, result) for result in all_written())} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_opens_no_file_that_it_does_not_declare(finished, opened, stage):
    declared = {*data_deps(stage), *written(stage), "params.yaml", ".scratch", "source"}
    # A file is written under a hidden temporary name next to it.
    plain = {re.sub(r"(^|/)\.([^/]+?)(\.\d+)?\.tmp", r"\1\2", path) for path in opened.paths[stage]}
    assert "params.yaml" in plain
    assert {path for path in plain if not any(lies_in(path, place) for place in declared)} == set()


def test_the_report_reads_every_result_that_it_declares(finished, opened):
    read = opened.paths["report"]
    assert {dep for dep in data_deps("report") if not any(lies_in(path, dep) for path in read)} == set()


@pytest.mark.parametrize("name", KEYS)
def test_metrics_are_flat_maps_with_the_keys_of_the_design(finished, name):
    values = read_json(finished / "metrics" / f"{name}.json")
    assert set(KEYS[name].split()) - values.keys() == set()
    assert all(isinstance(value, int | float | str) for value in values.values())


def test_training_saw_what_was_asked(finished):
    values = read_json(finished / "metrics/train.json")
    assert (values["steps"], values["tokens_seen"], values["hellaswag_items"]) == (6, 6 * 256, 20)
    assert values["val_loss"] < 11 and values["diverged"] == 0 and values["diverged_at_step"] == -1
    assert read_json(finished / "metrics/hellaswag.json")["items"] == 100
    assert not list((finished / ".scratch").rglob("*.safetensors")), "resume state is dropped at the end"


@pytest.mark.parametrize("plot", PIPELINE["plots"], ids=lambda plot: next(iter(plot)))
def test_plots_draw_columns_that_exist(finished, plot):
    for options in plot.values():
        for file, columns in options["y"].items():
            wanted = {options["x"], *([columns] if isinstance(columns, str) else columns)}
            assert wanted - set(read_columns(finished / file)) == set(), file


def test_the_report_needs_no_network(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'https?:|(?:src|href)=(?!"data:|"#)|url\(|@import', page)
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (finished / "report.md").read_text(encoding="utf-8"))
    assert links and all((finished / link).is_file() for link in links)


# --- inputs that do not fit


@pytest.fixture
def folder(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the finished pipeline without its models, in which stages run."""
    for name in ("data", "params.yaml"):
        source = finished / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


READERS = ("hellaswag", "head-similarity", "prune", "generate")


def stop(stage: str) -> str:
    """Run a stage that must fail; the message with which the process ends, and with it a status of 1."""
    with pytest.raises(SystemExit) as stopped:
        import_module(f"stages.{module_of(stage).stem}").main()
    assert isinstance(stopped.value.code, str) and stopped.value.code.startswith(f"{stage}: ")
    return stopped.value.code


@pytest.mark.parametrize("stage", READERS)
def test_a_missing_model_is_named_with_its_remedy(folder, stage):
    assert "models/gpt2 holds no model" in (message := stop(stage)) and "dvc repro train" in message
    assert not (folder / "metrics").exists() and not (folder / "plots").exists()


@pytest.mark.parametrize("stage", READERS[:3])
def test_a_model_of_another_vocabulary_is_refused(folder, stage):
    model = make_model()
    save_model(model, folder / "models/gpt2")
    message = stop(stage)
    assert f"vocab_size={model.config.vocab_size}" in message and "gpt2 of 50257" in message
    assert not (folder / "metrics").exists()


def test_missing_tokens_are_named_with_their_remedy(folder):
    shutil.rmtree(folder / "data/tokens")
    assert "data/tokens/train.json does not exist" in (message := stop("train")) and "dvc repro" in message
    assert not (folder / "models").exists()


def test_a_fault_in_the_parameters_stops_before_any_work(folder):
    write_params(folder, train={"max_lr": -1.0})
    (folder / "data/params.valid").unlink()
    message = stop("check-params")
    assert "tiny.train.max_lr = -1.0" in message and "full.train.max_lr" in message
    assert not (folder / "data/params.valid").exists()
