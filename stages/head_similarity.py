"""head-similarity: which attention heads of the trained model repeat each other."""

from pathlib import Path

from gpt2 import redundancy
from gpt2.dist import setup_device
from gpt2.evaluate import require_fit
from gpt2.files import write_csv, write_json
from gpt2.hardware import HardwareConfig
from gpt2.heads import HeadsConfig, compare_heads, save_similarities
from gpt2.model import GPT
from gpt2.shards import TokenSet
from gpt2.stage import Stage
from gpt2.weights import load_model
from gpt2.windows import spread_windows

MODEL = Path("models/gpt2")
TOKENS = Path("data/tokens")
SIMILARITIES = Path("data/heads.npz")
PLOTS = Path("plots/head_similarity")
METRICS = Path("metrics/heads.json")


def main() -> None:
    with Stage("head-similarity") as stage:
        config = stage.load("heads", HeadsConfig)
        device = setup_device(stage.load("hardware", HardwareConfig))
        model, tokens = load_model(MODEL, device), TokenSet(TOKENS, "val")
        require_fit(model, tokens)
        idx = spread_windows(tokens, model.config.block_size, config.n_tokens)[:, :-1]
        trained = compare_heads(model, idx, config.batch_size)
        untrained = compare_heads(GPT(model.config, config.seed).to(device), idx, config.batch_size)
        save_similarities(SIMILARITIES, model.config, trained, untrained["pattern"])

        pairs = redundancy.list_pairs(model.config, trained)
        null = redundancy.list_pairs(model.config, untrained)
        layers = redundancy.summarise_layers(pairs, null, config.threshold)
        write_csv(PLOTS / "matrix.csv", *redundancy.tabulate_matrix(model.config, trained["pattern"]))
        write_csv(PLOTS / "layers.csv", redundancy.LayerSummary._fields, layers)
        write_csv(PLOTS / "pairs.csv", redundancy.Pair._fields, redundancy.tabulate_pairs(pairs))
        figures = redundancy.summarise(model.config, pairs, null, config.threshold)
        write_json(METRICS, {**figures, "tokens": idx.numel()})


if __name__ == "__main__":
    main()
