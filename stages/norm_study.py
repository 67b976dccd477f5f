"""norm-study: the three norms compared over learning rates, warm-ups, seeds and arms."""

from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.norm_study.study import NormStudyConfig, load_study_data, run_study
from gpt2.norm_study.tables import average_curves, study_figures, tabulate_settings
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
        runs, curves = run_study(config, data, stage.load("hardware", HardwareConfig))
        tables = {"runs": runs, "table": tabulate_settings(runs), "curves": curves}
        tables |= {quantity: average_curves(curves, config, quantity) for quantity in ("loss", "grad_norm")}
        for name, table in tables.items():
            write_csv(FOLDER / f"{name}.csv", [*table.columns], table.itertuples(index=False))
        write_json(METRICS, study_figures(runs, config, data))


if __name__ == "__main__":
    main()
