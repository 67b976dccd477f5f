"""prune: which heads the trained model can lose, by criteria and repairs side by side, and the model that is left."""

from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.data.vocabulary import copy_vocabulary
from gpt2.heads.similarity import load_similarities
from gpt2.hellaswag.items import load_benchmark
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.model.dist import setup_device
from gpt2.model.evaluate import require_fit
from gpt2.model.weights import load_model, save_model
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage
from gpt2.prune.remove import PruneConfig
from gpt2.prune.speed import compare_speed
from gpt2.prune.study import study_pruning

MODEL = Path("models/gpt2")
SIMILARITIES = Path("data/heads.npz")
TOKENS = Path("data/tokens")
PRUNED = Path("models/pruned")
CURVES = Path("plots/prune")
METRICS = Path("metrics/prune.json")


def main() -> None:
    with Stage("prune") as stage:
        config = stage.load("prune", PruneConfig)
        batch_tokens = stage.load("hellaswag", HellaswagConfig).batch_tokens
        model = load_model(MODEL, setup_device(stage.load("hardware", HardwareConfig)))
        require_fit(model, TokenSet(TOKENS, "test"))
        similarities = load_similarities(SIMILARITIES, model.config)
        benchmark = load_benchmark(TOKENS / "hellaswag.npz")
        study = study_pruning(model, config, TOKENS, similarities, benchmark, batch_tokens)
        copy_vocabulary(MODEL, PRUNED)
        save_model(study.pruned, PRUNED)
        for name, table in study.tables.items():
            write_csv(CURVES / f"{name}.csv", *table)
        write_json(METRICS, study.figures)
        stage.timed |= compare_speed(study.timed, study.timing_windows)


if __name__ == "__main__":
    main()
