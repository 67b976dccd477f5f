"""prune: which heads the trained model can lose, by four criteria, and the smaller model that is left."""

from pathlib import Path

from gpt2.criteria import rank_heads
from gpt2.data import eval_windows
from gpt2.dist import setup_device
from gpt2.evaluate import require_fit
from gpt2.files import write_csv, write_json
from gpt2.frontier import choose_removed, compare_speed, measure_frontier, summarise, tabulate
from gpt2.hardware import HardwareConfig
from gpt2.heads import load_similarity
from gpt2.prune import PruneConfig, count_removals, remove_heads
from gpt2.shards import TokenSet
from gpt2.stage import Stage
from gpt2.weights import load_model, save_model

MODEL = Path("models/gpt2")
SIMILARITIES = Path("data/heads.npz")
TOKENS = Path("data/tokens")
PRUNED = Path("models/pruned")
FRONTIER = Path("plots/prune/frontier.csv")
METRICS = Path("metrics/prune.json")


def main() -> None:
    with Stage("prune") as stage:
        config = stage.load("prune", PruneConfig)
        model = load_model(MODEL, setup_device(stage.load("hardware", HardwareConfig)))
        counts = count_removals(model, config.shares)
        # Two splits, so that no criterion is judged on tokens it has seen.
        scoring_set, eval_set = TokenSet(TOKENS, "val"), TokenSet(TOKENS, "test")
        require_fit(model, eval_set)
        scoring = eval_windows(scoring_set, model.config.block_size, config.scoring_tokens)
        evaluation = eval_windows(eval_set, model.config.block_size, config.eval_tokens)

        similarity = load_similarity(SIMILARITIES, model.config)
        orders = rank_heads(model, similarity, scoring, config.batch_size, config.random_seeds)
        frontier = measure_frontier(model, orders, counts, evaluation, config.batch_size)
        criterion, removed = choose_removed(frontier, orders, config.limit_percent)
        pruned = remove_heads(model, removed)
        save_model(pruned, PRUNED)
        write_csv(FRONTIER, *tabulate(model, frontier))
        tokens = {"scoring_tokens": scoring[:, 1:].numel(), "eval_tokens": evaluation[:, 1:].numel()}
        write_json(METRICS, {**summarise(model, frontier, criterion, removed), **tokens})
        speed = compare_speed({"full": model, "pruned": pruned}, evaluation[: config.batch_size])
        stage.timed |= {f"{name}_tokens_per_s": figure for name, figure in speed.items()}


if __name__ == "__main__":
    main()
