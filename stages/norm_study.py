"""norm-study: the three norms side by side over learning rates, warm-ups and seeds."""

from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.norm_study.study import (
    CURVE_COLUMNS,
    NORM_RUN_COLUMNS,
    NORM_TABLE_COLUMNS,
    NormStudyConfig,
    curve_rows,
    load_study_data,
    norm_table_rows,
    run_rows,
    run_study,
    study_figures,
    wide_rows,
)
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage

TOKENS = Path("data/tokens")
CURVES = Path("plots/norm_study")
METRICS = Path("metrics/norm_study.json")


def main() -> None:
    with Stage("norm-study") as stage:
        config = stage.load("norm_study", NormStudyConfig)
        data = load_study_data(config, TokenSet(TOKENS, "train"), TokenSet(TOKENS, "val"))
        results = run_study(config, data, stage.load("hardware", HardwareConfig))
        write_csv(CURVES / "runs.csv", NORM_RUN_COLUMNS, run_rows(results, data))
        write_csv(CURVES / "table.csv", NORM_TABLE_COLUMNS, norm_table_rows(results, data))
        write_csv(CURVES / "curves.csv", CURVE_COLUMNS, curve_rows(results))
        columns = ("step", *config.norms)
        write_csv(CURVES / "loss.csv", columns, wide_rows(results, config, "losses"))
        write_csv(CURVES / "grad_norm.csv", columns, wide_rows(results, config, "grad_norms"))
        write_json(METRICS, study_figures(results, config, data))


if __name__ == "__main__":
    main()
