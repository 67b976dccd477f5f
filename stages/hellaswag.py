"""hellaswag: the trained model on all benchmark items, under both protocols."""

from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.hellaswag.items import load_benchmark
from gpt2.hellaswag.scoring import HellaswagConfig, score_model
from gpt2.model.dist import setup_device
from gpt2.model.evaluate import require_fit
from gpt2.model.weights import load_model
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage

MODEL = Path("models/gpt2")
TOKENS = Path("data/tokens")
METRICS = Path("metrics/hellaswag.json")
SCORES = Path("data/hellaswag_scores.csv")


def main() -> None:
    with Stage("hellaswag") as stage:
        config = stage.load("hellaswag", HellaswagConfig)
        model = load_model(MODEL, setup_device(stage.load("hardware", HardwareConfig)))
        require_fit(model, TokenSet(TOKENS, "val"))
        figures, columns = score_model(model, load_benchmark(TOKENS / "hellaswag.npz"), config.batch_tokens)
        write_csv(SCORES, list(columns), zip(*columns.values(), strict=True))
        write_json(METRICS, figures)


if __name__ == "__main__":
    main()
