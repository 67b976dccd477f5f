"""The card of an exported model: its shape, training and measurements."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from ruamel.yaml import YAML, YAMLError

from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError, read_json
from gpt2.report.markdown import number, table

# The figures of each model that the pipeline writes; no other model has any.
FIGURES = {
    "gpt2": {
        "Validation loss (nats per token)": "train.val_loss",
        "Validation perplexity": "train.val_perplexity",
        "Validation bits per byte": "train.val_bits_per_byte",
        "Benchmark, `completion` protocol, accuracy": "hellaswag.completion_acc",
        "Benchmark, `completion` protocol, mean per token": "hellaswag.completion_acc_norm",
        "Benchmark, `harness` protocol, accuracy": "hellaswag.harness_acc",
        "Benchmark, `harness` protocol, by characters": "hellaswag.harness_acc_norm",
    },
    "pruned": {
        "Heads removed": "prune.pruned_heads",
        "Test perplexity": "prune.pruned_perplexity",
        "Test perplexity before heads were removed": "prune.baseline_perplexity",
    },
}
TEMPLATE = Path(__file__).with_name("card.md.j2")


def write_card(model: GPT, folder: Path, encoding: str = "gpt2") -> str:
    """README.md of the exported `model` of `folder`, with its metrics where folder is one of the pipeline's.

    A figure whose file or key is missing is left out.
    """
    place = Path(os.path.abspath(folder))
    root, ours = place.parent.parent, place.parent.name == "models" and place.name in FIGURES
    metrics = {path.stem: read_json(path) for path in (root / "metrics").glob("*.json")} if ours else {}
    recorded = _read_recorded(root) if ours else {}
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["number"] = number
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=model.config,
        n_params=model.n_params(),
        encoding=encoding,
        train=metrics.get("train"),
        corpus=_name_corpus(recorded.get("prepare")),
        benchmark=recorded.get("benchmark", {}).get("source"),
        figures=_tabulate(metrics, FIGURES[place.name]) if ours else "",
        items=metrics["hellaswag"]["items"] if place.name == "gpt2" and "hellaswag" in metrics else None,
    )


def _read_recorded(root: Path) -> dict[str, Mapping[str, Any]]:
    """The parameters with which the stages ran, by section, from dvc.lock; params.yaml may have changed since."""
    try:
        stages = YAML(typ="safe", pure=True).load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        read = {stage: stages[stage]["params"]["params.yaml"] for stage in ("prepare", "benchmark") if stage in stages}
    except FileNotFoundError:
        return {}
    except (YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{root / 'dvc.lock'} cannot be read ({error}); restore it from Git") from error
    return {key.partition(".")[2]: values for params in read.values() for key, values in params.items()}


def _name_corpus(prepare: Mapping[str, Any] | None) -> str:
    """The source of the documents and what was chosen from it."""
    if prepare is None:
        return "a corpus that is not recorded with the model"
    given = {key: prepare.get(key) for key in ("packages", "path", "dataset", "files", "revision")}
    chosen = [f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in given.items() if value]
    listed = f" ({', '.join(chosen)})" if chosen else ""
    return f"source `{prepare['source']}`{listed} as in `dvc.lock`"


def _tabulate(metrics: Mapping[str, Mapping[str, Any]], figures: Mapping[str, str]) -> str:
    """The figures that exist as a Markdown table, "" without any."""
    rows = []
    for label, key in figures.items():
        file, _, field = key.partition(".")
        if field in (values := metrics.get(file, {})):
            error = f" ± {number(values[f'{field}_stderr'])}" if f"{field}_stderr" in values else ""
            rows.append((label, f"{number(values[field])}{error}", f"`metrics/{file}.json: {field}`"))
    return table(pd.DataFrame(rows, columns=["Figure", "Value", "From"])) if rows else ""
