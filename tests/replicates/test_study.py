"""Further models of the main line: trained by the same code, measured alike, resumable model by model."""

import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from gpt2.heads.similarity import HeadsConfig
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.model.config import GPTConfig
from gpt2.pipeline import params
from gpt2.pipeline.files import read_json, write_json
from gpt2.prune.remove import PruneConfig
from gpt2.replicates import study
from gpt2.replicates.study import MEASURED, SUMMARISED, MainLine, ReplicatesConfig
from gpt2.train.loop import TrainConfig
from tests.training_run import VOCABULARY, finish, kill, prepare_folder, start

CPU = torch.device("cpu")


def load_line(folder: Path) -> MainLine:
    """The main line of a folder as the stage makes it."""
    values = params.read(folder / "params.yaml")
    return MainLine(
        params.load("model", GPTConfig, values, norm="preln", vocab_size=VOCABULARY.vocab_size),
        params.load("train", TrainConfig, values),
        params.load("hellaswag", HellaswagConfig, values).batch_tokens,
        params.load("heads", HeadsConfig, values),
        params.load("prune", PruneConfig, values),
        folder / "data" / "tokens",
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory, whole) -> list[study.Figures]:
    """The model of `whole` trained again as a replicate, and one of another seed."""
    folder = prepare_folder(tmp_path_factory.mktemp("models"))
    line = load_line(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        return [study.measure_replicate(line, seed, CPU) for seed in (line.train.seed, 1)]


def test_a_replicate_is_trained_and_measured_as_the_main_model_is(models, whole):
    trained = {f"train.{key}": value for key, value in read_json(whole / "metrics/train.json").items()}
    again = {name: value for name, value in models[0].items() if name.startswith("train.")}
    assert again == trained


def test_models_differ_by_their_seed_alone(models):
    first, second = models
    assert first.keys() == second.keys() and second["seed"] == 1
    assert {name.split(".")[0] for name in first} == {"seed", *MEASURED}
    assert first["train.val_loss"] != second["train.val_loss"]
    assert first["train.steps"] == second["train.steps"] and first["heads.heads"] == second["heads.heads"]


def test_the_summary_has_mean_and_deviation_of_every_headline(models):
    table = study.tabulate_models(models)
    figures = study.summarise_models(table)
    assert figures["models"] == len(table) == 2
    for name in SUMMARISED:
        values, key = table[name], name.replace(".", "_")
        assert figures[f"{key}_mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert figures[f"{key}_sd"] == pytest.approx(values.std(ddof=1), abs=1e-6)


def test_one_model_has_no_deviation(models):
    figures = study.summarise_models(study.tabulate_models(models[:1]))
    assert figures["models"] == 1 and not [key for key in figures if key.endswith("_sd")]


def test_only_figures_that_all_models_have_are_columns(models):
    table = study.tabulate_models([models[0], {**models[1], "prune.extra": 1}])
    assert list(table) == list(models[0])


def test_seeds_must_differ():
    with pytest.raises(ValueError, match=r"seeds\n.* twice"):
        ReplicatesConfig(seeds=(1, 2, 1))


def write_main(folder: Path, figures: study.Figures) -> None:
    """Metrics of a main model, for the stage to read."""
    for stem in MEASURED:
        own = {name.split(".", 1)[1]: value for name, value in figures.items() if name.startswith(f"{stem}.")}
        write_json(folder / f"metrics/{stem}.json", own)


def test_a_killed_stage_resumes_and_gives_the_same_models(tmp_path, models):
    folder = prepare_folder(tmp_path)
    write_main(folder, models[0])
    process = start(folder, module="stages.replicates")
    scratch = folder / ".scratch" / "replicates"
    deadline = time.monotonic() + 120
    while not list(scratch.glob("*/figures.json")):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.02)
    kill(process)
    (finished,) = scratch.glob("*/figures.json")
    assert json.loads(finished.read_text()) == models[1]
    # A model that is finished is not trained again.
    finished.write_text(json.dumps({**models[1], "train.val_loss": 0.5}))
    log = finish(start(folder, module="stages.replicates"), folder)
    table = pd.read_csv(folder / "plots/replicates/models.csv")
    assert table["seed"].tolist() == [1337, 1, 2] and table["train.val_loss"][1] == 0.5
    assert table["train.val_loss"][0] == models[0]["train.val_loss"]
    assert read_json(folder / "metrics/replicates.json")["models"] == 3
    assert list(scratch.iterdir()) == [], log
