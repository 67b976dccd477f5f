"""norm-study: the three norms next to each other over learning rates, warm-ups, seeds and arms."""

from pathlib import Path

import pandas as pd

from gpt2.data.shards import TokenSet
from gpt2.norm_study.study import NormStudyConfig, load_study_data, run_study
from gpt2.norm_study.tables import average_curves, study_figures, tabulate_curves, tabulate_runs, tabulate_settings
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage

TOKENS = Path("data/tokens")
FOLDER = Path("plots/norm_study")
METRICS = Path("metrics/norm_study.json")


def main() -> None:
    with Stage("norm-study") as stage:
        config = stage.load("norm_study", NormStudyConfig)
        data = load_study_data(config, TokenSet(TOKENS, "train"), TokenSet(TOKENS, "val"))
        results = run_study(config, data, stage.load("hardware", HardwareConfig))
        runs, curves = tabulate_runs(results, data), tabulate_curves(results)
        _write("runs", runs)
        _write("table", tabulate_settings(runs))
        _write("curves", curves)
        for quantity in ("loss", "grad_norm"):
            _write(quantity, average_curves(curves, config, quantity))
        write_json(METRICS, study_figures(runs, config, data))


def _write(name: str, table: pd.DataFrame) -> None:
    write_csv(FOLDER / f"{name}.csv", [*table.columns], table.itertuples(index=False))


if __name__ == "__main__":
    main()
