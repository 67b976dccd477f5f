"""prune: which heads the trained model can lose, by four criteria and their repairs, and the model that is left."""

from pathlib import Path

from gpt2.criteria import rank_heads, score_taylor
from gpt2.dist import setup_device
from gpt2.evaluate import require_fit
from gpt2.files import write_csv, write_json
from gpt2.frontier import choose_removed, compare_speed, measure_frontier, summarise, tabulate
from gpt2.hardware import HardwareConfig
from gpt2.heads import load_similarity
from gpt2.prunability import HeadCost, correlate, cost_each_head
from gpt2.prune import PruneConfig, count_removals
from gpt2.repair import calibrate, remove_and_repair
from gpt2.shards import TokenSet
from gpt2.stage import Stage
from gpt2.vocabulary import copy_vocabulary
from gpt2.weights import load_model, save_model
from gpt2.windows import spread_windows

MODEL = Path("models/gpt2")
SIMILARITIES = Path("data/heads.npz")
TOKENS = Path("data/tokens")
PRUNED = Path("models/pruned")
FRONTIER = Path("plots/prune/frontier.csv")
HEADS = Path("plots/prune/heads.csv")
METRICS = Path("metrics/prune.json")


def main() -> None:
    with Stage("prune") as stage:
        config = stage.load("prune", PruneConfig)
        model = load_model(MODEL, setup_device(stage.load("hardware", HardwareConfig)))
        counts = count_removals(model, config.shares)
        # Three splits, so that no criterion and no repair is judged on tokens it has seen.
        calibration_set, scoring_set, eval_set = (TokenSet(TOKENS, split) for split in ("train", "val", "test"))
        require_fit(model, eval_set)
        seen, scoring, evaluation = (
            spread_windows(tokens, model.config.block_size, count)
            for tokens, count in (
                (calibration_set, config.calibration_tokens),
                (scoring_set, config.scoring_tokens),
                (eval_set, config.eval_tokens),
            )
        )

        similarity = load_similarity(SIMILARITIES, model.config)
        taylor = score_taylor(model, scoring, config.batch_size)
        costs = cost_each_head(model, similarity, taylor, evaluation, config.batch_size)
        write_csv(HEADS, HeadCost._fields, costs)
        orders = rank_heads(model, similarity, taylor, config.random_seeds)
        calibration = calibrate(model, seen, config.batch_size, config.ridge, similarity)
        frontier = measure_frontier(model, orders, counts, calibration, evaluation, config.batch_size)
        chosen, removed = choose_removed(frontier, orders, config.limit_percent)
        pruned = remove_and_repair(model, removed, chosen.repair, calibration)
        copy_vocabulary(MODEL, PRUNED)
        save_model(pruned, PRUNED)
        write_csv(FRONTIER, *tabulate(model, frontier))
        windows = {"calibration": seen, "scoring": scoring, "eval": evaluation}
        tokens = {f"{use}_tokens": rows[:, 1:].numel() for use, rows in windows.items()}
        write_json(METRICS, {**summarise(model, frontier, chosen, removed), **correlate(costs), **tokens})
        speed = compare_speed({"full": model, "pruned": pruned}, evaluation[: config.batch_size])
        stage.timed |= {f"{name}_tokens_per_s": figure for name, figure in speed.items()}


if __name__ == "__main__":
    main()
