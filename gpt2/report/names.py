"""Labels and order of what the studies compare, and the columns and metrics that belong to them."""

# GPT-2's own vocabulary, which was trained on another corpus.
GPT2_VOCABULARY = "gpt2"
# The embeddings' number among the layers of train/layers.csv.
EMBEDDINGS = -1
# Arms of the norm study.
MAIN_ARM = "main"
ARMS = {"main": "AdamW, tied output matrix", "own_output": "AdamW, own output matrix", "muon": "Muon, tied"}
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
    "mean": "mean output",
}
REPAIRED = (
    *("redundancy_refit", "redundancy_stepwise", "redundancy_merge", "redundancy_merge_refit", "taylor_refit"),
    *("taylor_stepwise", "magnitude_refit", "random_refit", "loss_refit", "redundancy_mean", "taylor_mean"),
)
# Similarities by which the redundancy criterion ranks heads: orders of prune/similarities.csv.
SIMILARITIES = {
    "redundancy": "attention patterns",
    "pattern_nosink": "patterns without the first key",
    "output": "head outputs",
    "written": "residual updates",
    "qk": "W_QK",
    "ov": "W_OV",
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

# Figures of every model that the report shows with their spread, by their names in replicates/models.csv.
HEADLINES = {
    "train.val_loss": "Validation loss (nats per token)",
    "train.val_bits_per_byte": "Validation bits per byte",
    "hellaswag.completion_acc_norm": "HellaSwag completion acc_norm",
    "hellaswag.harness_acc_norm": "HellaSwag harness acc_norm",
    "heads.redundant_pairs": "Pairs of heads above 0.85",
    "heads.uniform_heads_percent": "Heads that attend uniformly (%)",
    "heads.pairs_above_untrained_centred_threshold_percent": "Pairs above the untrained 95 % point (%)",
    "heads.pairs_above_shuffled_centred_threshold_percent": "Pairs above the shuffled 95 % point (%)",
    "prune.perplexity_rise_percent_at_15": "Rise without 15 %, redundancy (%)",
    "prune.matched_random_sets_perplexity_rise_percent_at_15": "Rise, random in the same layers (%)",
    "prune.random_sets_perplexity_rise_percent_at_15": "Rise, random (%)",
    "prune.taylor_perplexity_rise_percent_at_15": "Rise, Taylor (%)",
    "prune.max_pruned_percent_below_5": "Heads to remove below 5 %, redundancy (%)",
    "prune.redundancy_merge_refit_max_pruned_percent_below_5": "The same with merge and refit (%)",
    "prune.attention_loss": "Loss without any head, rise (nats)",
    "prune.pruned_perplexity_rise_percent": "Rise of the saved model (%)",
}


def split_pruning(column: str) -> tuple[str, str]:
    """Criterion and label of the repair of a column of prune/frontier.csv."""
    criterion = max((name for name in CRITERIA if f"{column}_".startswith(f"{name}_")), key=len)
    return criterion, REPAIRS.get(column.removeprefix(criterion).removeprefix("_"), "none")


def pruning_prefix(column: str) -> str:
    """Prefix of the metrics of a column of prune/frontier.csv; the reference's redundancy has none."""
    return "prune." if column == "redundancy" else f"prune.{column}_"
