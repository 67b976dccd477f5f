"""Labels and order of what the studies compare, and the columns and metrics that belong to them."""

# GPT-2's own vocabulary, which was trained on another corpus.
GPT2_VOCABULARY = "gpt2"
# The embeddings' number among the layers of train/layers.csv.
EMBEDDINGS = -1
WORD_GROUPS = ("rare", "compound", "technical")
# Criteria and repairs, and their combinations as columns of prune/frontier.csv.
CRITERIA = {
    "redundancy": "redundancy",
    "taylor": "Taylor",
    "taylor_iterative": "iterative Taylor",
    "magnitude": "magnitude",
    "random": "random",
    "loss": "greedy loss",
}
REPAIRS = {
    "refit": "refit",
    "stepwise": "stepwise refit",
    "merge": "merge",
    "merge_refit": "merge and stepwise refit",
}
REPAIRED = (
    *("redundancy_refit", "redundancy_stepwise", "redundancy_merge", "redundancy_merge_refit", "taylor_refit"),
    *("taylor_stepwise", "magnitude_refit", "random_refit", "loss_refit"),
)
# Similarities by which the redundancy criterion ranks heads: orders of prune/similarities.csv.
SIMILARITIES = {
    "redundancy": "attention patterns",
    "pattern_nosink": "patterns without the first key",
    "output": "head outputs",
    "written": "residual updates",
    "qk": "W_QK",
    "ov": "W_OV",
    "pattern_in_layer": "patterns, scaled within the layer",
    "circuits": "W_QK and W_OV",
    "written_taylor": "residual updates, lower Taylor removed",
    "written_distinct": "residual updates times their norm",
}
# Predictors of the cost of a single head: metrics prune.<predictor>_rank_correlation.
PREDICTORS = {
    **{"similarity": "attention patterns", "nosink": "patterns without the first key", "output": "head outputs"},
    **{"written": "residual updates", "qk": "W_QK", "ov": "W_OV", "taylor": "Taylor importance"},
}
# Rates of a pruned model in speed/prune.json.
PRUNED_RATES = {
    "prefill_tokens_per_s": "Prefill (tokens/s)",
    "prefill_batch_tokens_per_s": "Prefill, batch (tokens/s)",
    "decode_tokens_per_s": "Decode (tokens/s)",
    "decode_batch_tokens_per_s": "Decode, batch (tokens/s)",
}


def split_pruning(column: str) -> tuple[str, str]:
    """Criterion and label of the repair of a column of prune/frontier.csv."""
    criterion = max((name for name in CRITERIA if f"{column}_".startswith(f"{name}_")), key=len)
    return criterion, REPAIRS.get(column.removeprefix(criterion).removeprefix("_"), "none")


def pruning_prefix(column: str) -> str:
    """Prefix of the metrics of a column of prune/frontier.csv; the reference's redundancy has none."""
    return "prune." if column == "redundancy" else f"prune.{column}_"
