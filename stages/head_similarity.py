"""head-similarity: which attention heads of the trained model repeat each other."""

from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.heads import redundancy
from gpt2.heads.null_models import compare_with_nulls
from gpt2.heads.similarity import HeadsConfig, save_similarities
from gpt2.model.dist import setup_device
from gpt2.model.evaluate import require_fit
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
        tokens = TokenSet(TOKENS, "val")
        require_fit(model, tokens)
        idx = spread_windows(tokens, model.config.block_size, config.n_tokens)[:, :-1]
        matrices = compare_with_nulls(model, idx, config)
        save_similarities(SIMILARITIES, model.config, matrices)

        pairs = redundancy.list_pairs(model.config, matrices)
        rules = (config.threshold, config.null_percentile)
        layers = redundancy.summarise_layers(pairs, *rules)
        write_csv(PLOTS / "matrix.csv", *redundancy.tabulate_matrix(model.config, matrices["pattern"]))
        write_csv(PLOTS / "layers.csv", redundancy.LayerSummary._fields, layers)
        write_csv(PLOTS / "pairs.csv", redundancy.Pair._fields, redundancy.tabulate_pairs(pairs))
        write_json(METRICS, {**redundancy.summarise_pairs(model.config, pairs, *rules), "tokens": idx.numel()})


if __name__ == "__main__":
    main()
