"""What the stages measured, read back by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from gpt2.pipeline.files import UserError, read_json

MODELS = "replicates/models.csv"


@dataclass(frozen=True)
class Model:
    """The figures of one model of the main line, named file.key."""

    figures: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """The figure `file.key`. Raises UserError if no column of plots/replicates/models.csv has it."""
        if name not in self.figures:
            raise UserError(f"plots/{MODELS} lacks the column {name}; run its stage again: {_remedy(MODELS)}")
        return self.figures[name]


@dataclass(frozen=True)
class Results:
    """The metrics and curves below `root`, and the parameters of the run that made them.

    `settings` are the sections of the active scale as params.yaml gives them.
    """

    root: Path
    norm: str
    scale: str
    settings: Mapping[str, Mapping]

    @property
    def loaded_from(self) -> str | None:
        """Where the weights were loaded from in place of training; None if they were trained."""
        return self.settings["train"].get("init_from")

    def value(self, name: str) -> Any:
        """The metric `file.key`, as in `train.val_loss`. Raises UserError naming file, key and stage if absent."""
        stem, key = name.split(".", 1)
        path = Path("metrics") / f"{stem}.json"
        values = read_json(self.root / path)
        if key not in values:
            raise UserError(f"{path} lacks the key {key}; run its stage again: dvc repro --force {stage_of(path)}")
        return values[key]

    def has(self, name: str) -> bool:
        """Whether there is the metric `file.key`."""
        stem, key = name.split(".", 1)
        return key in read_json(self.root / "metrics" / f"{stem}.json")

    @cached_property
    def models(self) -> list[Model]:
        """All models of the main line, the main one first."""
        return [
            Model({str(name): row[name] for name in row.index}) for _, row in self.table(MODELS, ["seed"]).iterrows()
        ]

    def over_models(self, name: str) -> list[float]:
        """The figure `file.key` of every model."""
        return [float(model.value(name)) for model in self.models]

    def speed(self, stage: str) -> dict[str, float]:
        """Seconds, memory and rates that a stage measured of itself."""
        return read_json(self.root / "metrics/speed" / f"{stage}.json")

    def table(self, name: str, columns: Sequence[str], may_be_empty: bool = False) -> pd.DataFrame:
        """The CSV plots/`name`, with NaN for what is missing or not finite.

        Raises UserError if the file is absent, lacks one of `columns` or, unless it may be empty, has no rows.
        """
        frame = self._read(name, columns, na_values=["", "nan", "inf", "-inf"])
        if frame.empty and not may_be_empty:
            raise UserError(f"plots/{name} has no rows; run its stage again: {_remedy(name)}")
        return frame

    def texts(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        """The CSV plots/`name` as it is written: the word nan is no missing value. Raises UserError as `table`."""
        return self._read(name, columns, dtype=str)

    def _read(self, name: str, columns: Sequence[str], **options) -> pd.DataFrame:
        path = Path("plots") / name
        try:
            frame = pd.read_csv(self.root / path, keep_default_na=False, **options)
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; run the stage that writes it: {_remedy(name)}") from error
        except pd.errors.EmptyDataError as error:
            raise UserError(f"{path} is empty; run its stage again: {_remedy(name)}") from error
        if missing := [column for column in columns if column not in frame]:
            raise UserError(f"{path} lacks the column {', '.join(missing)}; run its stage again: {_remedy(name)}")
        return frame

    def setting(self, section: str, key: str) -> Any:
        """A parameter of the active scale. Raises UserError if params.yaml lacks it."""
        try:
            return self.settings[section][key]
        except KeyError as error:
            raise UserError(f"params.yaml lacks {self.scale}.{section}.{key}; add it") from error


def stage_of(path: Path) -> str:
    """Name in dvc.yaml of the stage that writes metrics/<stage>.json or plots/<stage>/<file>."""
    stem = path.stem if path.parts[0] == "metrics" else path.parts[1]
    return {"tokens": "tokenize", "tokenizer": "tokenizer-study", "heads": "head-similarity"}.get(
        stem, stem.replace("_", "-")
    )


def _remedy(plot: str) -> str:
    return f"dvc repro --force {stage_of(Path('plots') / plot)}"
