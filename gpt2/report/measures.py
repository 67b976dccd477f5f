"""Measurements behind the claims: from the results of a run to whether a rule holds, and the figures as text."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from gpt2.report.markdown import number
from gpt2.report.results import Results

# Whether the rule holds, None where the figures cannot say, and what was measured.
Finding = tuple[bool | None, str]

REFERENCE_PARAMS = 124_439_808
REFERENCE_ENCODING = "gpt2"
REFERENCE_STEPS = 95_365
REFERENCE_TOKENS_PER_STEP = 524_288
# Training FLOPs (PaLM's count) of all steps.
REFERENCE_FLOPS = 4.27e19
REFERENCE_GPU_HOURS = 2 * 46
# Of OpenAI's weights on the validation shard of FineWeb-Edu (build-nanogpt).
REFERENCE_VAL_LOSS = 3.2924
MAX_RISE_PERCENT = 5
# What chooses the heads to remove, in words, and by what the others then make up for them, as columns of
# prune/frontier.csv name them. Plain redundancy is the reference's way.
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
    *(f"{criterion}_refit" for criterion in CRITERIA if criterion != "taylor_iterative"),
    *("redundancy_stepwise", "taylor_stepwise", "redundancy_merge", "redundancy_merge_refit"),
)
# Random choices stand for comparison.
CHOSEN = tuple(name for name in CRITERIA if name != "random")
CHOSEN_REPAIRED = tuple(name for name in REPAIRED if not name.startswith("random"))
# What redundancy may go by, and how: orders of prune/similarities.csv.
SIMILARITIES = {
    "redundancy": "attention patterns",
    "pattern_nosink": "patterns without the first key",
    "output": "outputs",
    "written": "what is written",
    "qk": "circuit W_QK",
    "ov": "circuit W_OV",
    "pattern_in_layer": "patterns, scaled within the layer",
    "circuits": "both circuits",
    "written_taylor": "what is written, lower Taylor goes",
    "written_distinct": "what is written, times its size",
}
# What may tell how much a head costs: of which metrics of prune a rank correlation is.
PREDICTOR_NAMES = {
    "similarity": "attention patterns",
    "nosink": "patterns without the first key",
    "output": "outputs",
    "written": "what is written",
    "qk": "circuit W_QK",
    "ov": "circuit W_OV",
    "taylor": "Taylor importance",
}
# Rates of a pruned model in speed/prune.json.
PRUNED_RATES = {
    "prefill_tokens_per_s": "Read one (tokens/s)",
    "prefill_batch_tokens_per_s": "Read a batch (tokens/s)",
    "decode_tokens_per_s": "Write one (tokens/s)",
    "decode_batch_tokens_per_s": "Write a batch (tokens/s)",
}
# Below this chance, shared among all that are tried, a choice counts as better than random ones.
SIGNIFICANCE = 0.05
# Goal of this project: so many times the heads that plain redundancy can remove, with a repair.
REPAIR_GAIN = 2
# One of four endings is right.
HELLASWAG_CHANCE = 0.25
WORD_GROUPS = ("rare", "compound", "technical")
VOCABULARY_COLUMNS = (
    *("name", "vocab_size", "bytes_per_token", "tokens_per_document", "documents_in_context_percent"),
    *("renyi_efficiency", "tokens_per_word", "words_kept_whole_percent", "words_in_three_or_more_percent"),
    *("embedding_params", "embedding_params_percent", "logits_bytes", "flops_per_byte"),
)
BITS_COLUMNS = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "even_bits_per_byte")
# The embeddings' number among the layers of train/layers.csv.
EMBEDDINGS = -1
# Attention kernels that never hold a T x T matrix of scores.
FUSED_ATTENTION = ("flash", "cudnn", "efficient")


def is_above_chance(accuracy: float, stderr: float) -> bool:
    """Whether an accuracy is more than three standard errors above guessing one of four endings."""
    return accuracy > HELLASWAG_CHANCE + 3 * stderr


def standard_error(accuracy: float, items: int) -> float:
    """Of the share of right answers among independent items."""
    return math.sqrt(accuracy * (1 - accuracy) / (items - 1))


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's correlation of the values with their order; 0 if they are all equal."""
    ranks = pd.Series(values).rank().to_numpy()
    if np.ptp(ranks) == 0:
        return 0.0
    return float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1])


def rises(accuracies: Sequence[float], items: int) -> bool:
    """Whether accuracies on the same items rise along training.

    Their rank correlation with time must be positive and the last at least two standard errors of the difference above
    the first. The items are the same each time, which makes this bound stricter than its name.
    """
    first, last = accuracies[0], accuracies[-1]
    noise = math.hypot(standard_error(first, items), standard_error(last, items))
    return rank_correlation(accuracies) > 0 and last - first >= 2 * noise


def is_smooth(spikes: int, diverged: int, stalled: int) -> bool:
    """Whether a run had none of the three forms of failure."""
    return not (spikes or diverged or stalled)


def falls(values: Sequence[float]) -> bool:
    """Whether each value is below the one before it."""
    return all(after < before for before, after in pairwise(values))


def measure_parameters(results: Results) -> Finding:
    found = results.value("train.n_params")
    return found == REFERENCE_PARAMS, f"{number(found)} parameters"


def measure_corpus(results: Results) -> Finding:
    source, tokens = results.setting("prepare", "source"), results.value("tokens.tokens_train")
    return source == "fineweb_edu" and tokens >= 9.5e9, f"{number(tokens)} training tokens from source `{source}`"


def measure_split(results: Results) -> Finding:
    train, val, test = (results.value(f"prepare.documents_{split}") for split in ("train", "val", "test"))
    total = train + val + test
    train, val = 100 * train / total, 100 * val / total
    return 97 <= train <= 99 and 0.5 <= val <= 1.5, f"{train:.2f} % and {val:.2f} % of {number(total)} documents"


def measure_held_out(results: Results) -> Finding:
    found, items = results.value("tokens.benchmark_items_in_train"), results.value("tokens.benchmark_items")
    return found == 0, f"{number(found)} of {number(items)} items found in training documents"


def measure_steps(results: Results) -> Finding:
    steps, size = results.value("train.steps"), results.value("train.tokens_per_step")
    holds = steps >= REFERENCE_STEPS and size == REFERENCE_TOKENS_PER_STEP
    return holds, f"{number(steps)} steps of {number(size)} tokens, {number(results.value('train.epochs'))} epochs"


def measure_learning(results: Results) -> Finding:
    loss, entropy = results.value("train.val_loss"), results.value("train.unigram_entropy")
    stalled, diverged = results.value("train.stalled"), results.value("train.diverged")
    measured = f"{number(loss)} nats against {number(entropy)}{', stalled' * stalled}{', diverged' * diverged}"
    return loss < entropy and not stalled and not diverged, measured


def measure_validation_loss(results: Results) -> Finding:
    loss, encoding = results.value("train.val_loss"), results.value("tokens.encoding")
    if encoding != REFERENCE_ENCODING:
        return None, f"{number(loss)} nats per token of {encoding}, another unit"
    return loss <= REFERENCE_VAL_LOSS, f"{number(loss)} nats per token on this corpus"


def measure_rising(results: Results) -> Finding:
    accuracies = results.table("train/eval.csv", ["step", "hellaswag_acc_norm"])["hellaswag_acc_norm"].dropna().tolist()
    if len(accuracies) < 3:
        # A run that broke off was not too short by design.
        return False if results.value("train.diverged") else None, f"{len(accuracies)} of the 3 evaluations needed"
    first, last, correlation = 100 * accuracies[0], 100 * accuracies[-1], rank_correlation(accuracies)
    measured = f"{first:.2f} to {last:.2f} %, rank correlation {correlation:+.2f}"
    return rises(accuracies, results.value("train.hellaswag_items")), measured


def measure_above_chance(results: Results) -> Finding:
    accuracy, stderr = (results.value(f"hellaswag.completion_acc_norm{end}") for end in ("", "_stderr"))
    measured = f"{100 * accuracy:.2f} ± {100 * stderr:.2f} % of {number(results.value('hellaswag.items'))} items"
    return is_above_chance(accuracy, stderr), measured


def measure_shuffling(results: Results) -> Finding:
    kept, windows = results.value("train.windows_in_same_place"), results.value("train.windows_per_epoch")
    return (
        windows > 10 and kept <= 10,
        f"{number(kept)} of {number(windows)} windows keep their place in the next epoch",
    )


def measure_attention(results: Results) -> Finding:
    backend = results.value("train.attention_backend")
    return str(backend).startswith(FUSED_ATTENTION), f"backend `{backend}`"


def read_norm_settings(results: Results) -> pd.DataFrame:
    """The norm study: a row for each norm, learning rate and warm-up.

    `lost` counts the runs that learned nothing, for they diverged or stalled; `rough` says whether any run spiked or
    diverged.
    """
    columns = ["norm", "max_lr", "warmup_steps", "seeds", "loss_spikes", "diverged", "stalled", "max_grad_norm"]
    table = results.table("norm_study/table.csv", columns)
    return table.assign(
        lost=table["diverged"] + table["stalled"], rough=(table["loss_spikes"] > 0) | (table["diverged"] > 0)
    )


def name_setting(max_lr: float, warmup_steps: int) -> str:
    """A learning rate and warm-up in words."""
    return f"{max_lr:g} {f'with {number(warmup_steps)} warm-up steps' if warmup_steps else 'without warm-up'}"


def measure_smoothness(results: Results) -> Finding:
    settings = read_norm_settings(results)
    preln = settings[settings["norm"] == "preln"]
    if preln.empty:
        return None, "preln was not studied"
    runs, *faults = (int(preln[name].sum()) for name in ("seeds", "loss_spikes", "diverged", "stalled"))
    spikes, diverged, stalled = map(number, faults)
    measured = f"{spikes} spikes, {diverged} diverged and {stalled} stalled in {number(runs)} runs"
    return is_smooth(*faults), f"{measured}; largest gradient norm {number(preln['max_grad_norm'].max())}"


def measure_roughness(results: Results) -> Finding:
    pairs = _pair_norms(results)
    if pairs.empty:
        return None, "preln and postln were not studied side by side"
    worse = pairs[pairs["rough_postln"] & ~pairs["rough_preln"]]
    stalled = int((pairs["stalled_postln"] > 0).sum())
    return len(worse) > 0, f"in {_list_settings(worse, len(pairs))}; postln stalls, another failure, in {stalled}"


def measure_failure(results: Results) -> Finding:
    pairs = _pair_norms(results)
    if pairs.empty:
        return None, "preln and postln were not studied side by side"
    worse = pairs[(pairs["lost_postln"] == pairs["seeds_postln"]) & (pairs["lost_preln"] == 0)]
    return len(worse) > 0, f"in {_list_settings(worse, len(pairs))}"


def _pair_norms(results: Results) -> pd.DataFrame:
    """Pre-LN and Post-LN at the learning rates and warm-ups that both were run at."""
    settings = read_norm_settings(results)
    preln, postln = (settings[settings["norm"] == norm] for norm in ("preln", "postln"))
    return preln.merge(postln, on=["max_lr", "warmup_steps"], suffixes=("_preln", "_postln"))


def _list_settings(settings: pd.DataFrame, total: int) -> str:
    names = "; ".join(name_setting(*row) for row in settings[["max_lr", "warmup_steps"]].itertuples(index=False))
    return f"{len(settings)} of {total} settings" + (f" ({names})" if names else "")


def measure_similar_heads(results: Results) -> Finding:
    pairs, heads = results.value("heads.redundant_pairs"), results.value("heads.redundant_heads")
    highest = number(results.value("heads.max_similarity"))
    return pairs > 0, f"{number(pairs)} pairs among {number(heads)} heads; highest cosine {highest}"


def measure_beyond_null(results: Results) -> Finding:
    trained, untrained = results.value("heads.redundant_pairs"), results.value("heads.untrained_redundant_pairs")
    return trained > untrained, f"{number(trained)} pairs, untrained {number(untrained)}"


def measure_beyond_order(results: Results) -> Finding:
    text, shuffled = results.value("heads.redundant_pairs"), results.value("heads.shuffled_redundant_pairs")
    correlation = results.value("heads.shuffled_rank_correlation")
    measured = f"{number(text)} pairs, shuffled {number(shuffled)}; rank correlation of the cosines {correlation:+.2f}"
    return text > shuffled, measured


def measure_middle(results: Results) -> Finding:
    share, layers = results.value("heads.redundant_pairs_middle_percent"), results.value("heads.middle_layers_percent")
    pairs = number(results.value("heads.redundant_pairs"))
    return share > max(50, layers), f"{share:.1f} % of {pairs} pairs, in {layers:.1f} % of the layers"


def name_pruning(column: str) -> tuple[str, str]:
    """Criterion and, in words, repair of a column of prune/frontier.csv."""
    criterion = max((name for name in CRITERIA if f"{column}_".startswith(f"{name}_")), key=len)
    return criterion, REPAIRS.get(column.removeprefix(criterion).removeprefix("_"), "none")


def pruning_key(column: str, figure: str) -> str:
    """Name of a metric of a column of prune/frontier.csv."""
    return f"prune.{figure}" if column == "redundancy" else f"prune.{column}_{figure}"


def rise_at_15(results: Results, column: str) -> float:
    """Rise of perplexity in percent with 15 % of the heads removed."""
    return results.value(pruning_key(column, "perplexity_rise_percent_at_15"))


def most_below_5(results: Results, column: str) -> float:
    """Largest share of the heads, in percent, whose removal raises perplexity by less than 5 %."""
    return results.value(pruning_key(column, "max_pruned_percent_below_5"))


def tell_rise(results: Results, column: str) -> str:
    """The rise at 15 % with its 95 % interval, in words."""
    key = pruning_key(column, "perplexity_rise_percent_at_15")
    low, high = (results.value(f"{key}_{end}") for end in ("low", "high"))
    return f"{rise_at_15(results, column):+.2f} % [{low:+.2f}, {high:+.2f}]"


def measure_pruning(results: Results, column: str) -> Finding:
    removed, heads = results.value("prune.heads_removed_at_15"), results.value("heads.heads")
    measured = f"{tell_rise(results, column)} for {number(removed)} of {number(heads)} heads"
    return rise_at_15(results, column) < MAX_RISE_PERCENT, measured


def measure_choice(results: Results) -> Finding:
    chosen, random = rise_at_15(results, "redundancy"), rise_at_15(results, "random")
    measured = f"{tell_rise(results, 'redundancy')} against {random:+.2f} % at random"
    return chosen < random, f"{measured}; {tell_chance(results, 'redundancy')}"


def cheaper_sets(results: Results, column: str) -> int:
    """How many random sets of 15 % of the heads cost less than those that a column without repair chooses."""
    return results.value(pruning_key(column, "cheaper_random_sets_at_15"))


def tell_chance(results: Results, column: str) -> str:
    sets = number(results.value("prune.random_sets"))
    return f"{number(cheaper_sets(results, column))} of {sets} random sets cost less"


def similarity_column(order: str) -> str:
    """What stands in metrics for an order of prune/similarities.csv."""
    return order if order == "redundancy" else f"similarity_{order}"


def measure_similarity_choice(results: Results) -> Finding:
    sets = results.value("prune.random_sets")
    cheaper = {order: cheaper_sets(results, similarity_column(order)) for order in SIMILARITIES}
    best = min(cheaper, key=lambda order: (cheaper[order], rise_at_15(results, similarity_column(order))))
    needed, chance = SIGNIFICANCE / len(SIMILARITIES), (1 + cheaper[best]) / (1 + sets)
    measured = (
        f"by {SIMILARITIES[best]}, the best of {len(SIMILARITIES)}, {tell_rise(results, similarity_column(best))}; "
        f"{tell_chance(results, similarity_column(best))}"
    )
    if cheaper[best] == 0 and chance > needed:
        return None, f"{measured}, too few sets to tell"
    return chance <= needed, measured


def measure_repair(results: Results) -> Finding:
    plain = most_below_5(results, "redundancy")
    most = {column: most_below_5(results, column) for column in CHOSEN_REPAIRED}
    best = max(most, key=most.__getitem__)
    criterion, repair = name_pruning(best)
    measured = f"{number(most[best])} % by {CRITERIA[criterion]} with {repair} against {number(plain)} %"
    return most[best] > 0 and most[best] >= REPAIR_GAIN * plain, measured


def read_vocabularies(results: Results) -> pd.DataFrame:
    """The vocabularies of the tokenizer study, smallest first.

    `own` is False for GPT-2's, which was learned on another corpus and so stands outside the comparison of sizes.
    """
    groups = [f"{group}_tokens_per_word" for group in WORD_GROUPS]
    columns = [*VOCABULARY_COLUMNS, *groups]
    table = results.table("tokenizer/vocabularies.csv", columns).sort_values("vocab_size", ignore_index=True)
    return table.assign(own=table["name"] != REFERENCE_ENCODING)


def measure_vocabularies(results: Results, column: str, rising: bool = False) -> Finding:
    table = read_vocabularies(results)
    own = table[table["own"]]
    values = own[column].tolist()
    sizes = f"{number(own['vocab_size'].min())} to {number(own['vocab_size'].max())} tokens"
    measured = f"{', '.join(map(number, values))} from {sizes} of vocabulary"
    return falls(values[::-1] if rising else values) if len(values) > 1 else None, measured


def read_vocabulary_runs(results: Results) -> pd.DataFrame:
    """The small models of the tokenizer study: a row for each budget and vocabulary, both from the smallest on.

    `own` as in `read_vocabularies`. Bits per byte are NaN where a run diverged.
    """
    bits = [f"{part}{key}" for part in ("", "rare_") for key in BITS_COLUMNS]
    columns = ["budget", "name", "vocab_size", "seeds", "steps", "bytes", *bits]
    table = results.table("tokenizer/runs_table.csv", columns)
    return table.sort_values(["budget", "vocab_size"], ignore_index=True).assign(
        own=lambda rows: rows["name"] != REFERENCE_ENCODING
    )


def best_by_budget(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the vocabularies trained here, the row with the fewest bits per byte at each budget."""
    own = runs[runs["own"]].dropna(subset=["bits_per_byte"])
    return own.loc[own.groupby("budget")["bits_per_byte"].idxmin()]


def measure_vocabulary_runs(results: Results, column: str) -> Finding:
    runs = read_vocabulary_runs(results)
    own = runs[runs["own"] & (runs["budget"] == runs["budget"].max())]
    sizes = f"{number(own['vocab_size'].min())} to {number(own['vocab_size'].max())} tokens"
    measured = f"{', '.join(map(number, own[column]))} from {sizes} of vocabulary"
    small, large = own.iloc[0], own.iloc[-1]
    # NaN, of runs that diverged, is below nothing.
    return bool(large[f"{column}_high"] < small[f"{column}_low"]) if len(own) > 1 else None, measured


def measure_generation(results: Results) -> Finding:
    texts = results.texts("generate/samples.csv", ["prompt", "text"])["text"]
    written = sum(bool(text.strip()) for text in texts)
    return 0 < written == len(texts), f"{written} of {len(texts)} prompts continued"


def measure_gpu_hours(results: Results) -> Finding:
    processes, hours = results.value("speed/train.processes"), results.value("speed/train.seconds") / 3600
    return 1 < processes <= REFERENCE_GPU_HOURS / hours, f"{number(hours)} h on {number(processes)} processes"
