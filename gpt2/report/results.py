"""What the stages measured, read back by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gpt2.pipeline.files import UserError, read_json

MODELS = "replicates/models.csv"


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

    def setting(self, section: str, key: str) -> Any:
        """A parameter of the active scale. Raises UserError if params.yaml lacks it."""
        try:
            return self.settings[section][key]
        except KeyError as error:
            raise UserError(f"params.yaml lacks {self.scale}.{section}.{key}; add it") from error

    def value(self, name: str) -> Any:
        """The metric `file.key`, as in `train.val_loss`. Raises UserError naming file, key and stage if absent."""
        stem, key = name.split(".", 1)
        path = Path("metrics") / f"{stem}.json"
        values = read_json(self.root / path)
        if key not in values:
            raise UserError(f"{path} lacks the key {key}; {_remedy(path)}")
        return values[key]

    def has(self, name: str) -> bool:
        """Whether there is the metric `file.key`."""
        stem, key = name.split(".", 1)
        return key in read_json(self.root / "metrics" / f"{stem}.json")

    def speed(self, stage: str) -> dict[str, float]:
        """Seconds, memory and rates that a stage measured of itself."""
        return read_json(self.root / "metrics/speed" / f"{stage}.json")

    def over_models(self, name: str) -> np.ndarray:
        """The figure `file.key` of all models of the main line, the main one first. Raises UserError as `table`."""
        return self.table(MODELS, [name])[name].to_numpy(dtype=float)

    def table(self, name: str, columns: Sequence[str], may_be_empty: bool = False) -> pd.DataFrame:
        """The CSV plots/`name`, with NaN for what is missing or not finite.

        Raises UserError if the file is absent, lacks one of `columns` or, unless it may be empty, has no rows.
        """
        frame = self._read(name, columns, na_values=["", "nan", "inf", "-inf"])
        if frame.empty and not may_be_empty:
            raise UserError(f"plots/{name} has no rows; {_remedy(Path('plots') / name)}")
        return frame

    def texts(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        """The CSV plots/`name` as it is written: the word nan is no missing value. Raises UserError as `table`."""
        return self._read(name, columns, dtype=str)

    def _read(self, name: str, columns: Sequence[str], **options) -> pd.DataFrame:
        path = Path("plots") / name
        try:
            frame = pd.read_csv(self.root / path, keep_default_na=False, **options)
        except (FileNotFoundError, pd.errors.EmptyDataError) as error:
            fault = "does not exist" if isinstance(error, FileNotFoundError) else "is empty"
            raise UserError(f"{path} {fault}; {_remedy(path)}") from error
        if missing := [column for column in columns if column not in frame]:
            raise UserError(f"{path} lacks the column {', '.join(missing)}; {_remedy(path)}")
        return frame


def stage_of(path: Path) -> str:
    """Name in dvc.yaml of the stage that writes metrics/<stage>.json or plots/<stage>/<file>."""
    stem = path.stem if path.parts[0] == "metrics" else path.parts[1]
    names = {"tokens": "tokenize", "tokenizer": "tokenizer-study", "heads": "head-similarity"}
    return names.get(stem, stem.replace("_", "-"))


def _remedy(path: Path) -> str:
    return f"run its stage again: dvc repro --force {stage_of(path)}"
