"""head-similarity: how alike the attention heads of the trained model are."""

from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.heads.similarity import HeadsConfig, save_similarities
from gpt2.heads.study import study_heads
from gpt2.model.dist import setup_device
from gpt2.model.weights import load_model
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage

MODEL = Path("models/gpt2")
TOKENS = Path("data/tokens")
SIMILARITIES = Path("data/heads.npz")
PLOTS = Path("plots/head_similarity")
METRICS = Path("metrics/heads.json")


def main() -> None:
    with Stage("head-similarity") as stage:
        config = stage.load("heads", HeadsConfig)
        model = load_model(MODEL, setup_device(stage.load("hardware", HardwareConfig)))
        study = study_heads(model, TokenSet(TOKENS, "val"), config)
        save_similarities(SIMILARITIES, model.config, study.matrices)
        for name, table in study.tables.items():
            write_csv(PLOTS / f"{name}.csv", list(table.columns), table.itertuples(index=False))
        write_json(METRICS, study.figures)


if __name__ == "__main__":
    main()
