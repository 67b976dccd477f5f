"""Measurements behind the claims: from the figures of a run, and of all its models, to a verdict.

Each function returns a verdict by a rule of verdicts.py, and what was measured as text, which names a single model.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from gpt2.report.frames import load_vocabularies, write_spread
from gpt2.report.markdown import number
from gpt2.report.names import GPT2_VOCABULARY, MAIN_ARM, SIMILARITIES, pruning_prefix
from gpt2.report.results import Model, Results
from gpt2.report.verdicts import (
    SIGNIFICANCE,
    Finding,
    of_best,
    of_comparison,
    of_each,
    of_fact,
    of_interval,
    of_margins,
    of_trouble,
)

REFERENCE_PARAMS = 124_439_808
REFERENCE_STEPS = 95_365
REFERENCE_TOKENS_PER_STEP = 524_288
REFERENCE_GPU_HOURS = 2 * 46
# Of OpenAI's weights on the validation shard of FineWeb-Edu (build-nanogpt).
REFERENCE_VAL_LOSS = 3.2924
# Of the perplexity, without 15 % of the heads.
MAX_RISE_PERCENT = 5
# A training has levelled off if the validation loss falls by less than this over the last fifth of the steps.
MAX_LATE_FALL_PERCENT = 1
# The largest gradient norm of a smooth run, where gradients are clipped at 1.
MAX_GRAD_NORM = 100
# Fewer similar pairs do not show in which layers they are.
MIN_PAIRS = 20
# A repair has to remove this many times the heads that the criterion removes alone.
REPAIR_GAIN = 2
# One of four endings is right.
HELLASWAG_CHANCE = 0.25
REPAIRS_OF_REDUNDANCY = ("refit", "stepwise", "merge", "merge_refit")
# Attention kernels that never hold a T x T matrix of scores.
FUSED_ATTENTION = ("flash", "cudnn", "efficient")


def spread(values: Sequence[float], unit: str = "", sign: str = "") -> str:
    """Mean ± sample standard deviation (number of models) in words; of one model its value."""
    if len(values) > 1:
        return write_spread(pd.Series(values), unit, sign)
    return f"{values[0]:+.2f}{unit} (one model)" if sign else f"{number(values[0])}{unit} (one model)"


def signed(value: float) -> str:
    """A change in percent: +3.83."""
    return f"{value:+.2f}"


def measure_parameters(results: Results) -> Finding:
    found = results.value("train.n_params")
    return Finding(of_fact(found == REFERENCE_PARAMS), f"{number(found)} parameters")


def measure_corpus(results: Results) -> Finding:
    source, tokens = results.setting("prepare", "source"), results.value("tokens.tokens_train")
    holds = source == "fineweb_edu" and tokens >= 9.5e9
    return Finding(of_fact(holds), f"{number(tokens)} training tokens from source `{source}`")


def measure_split(results: Results) -> Finding:
    train, val, test = (results.value(f"prepare.documents_{split}") for split in ("train", "val", "test"))
    total = train + val + test
    train, val = 100 * train / total, 100 * val / total
    holds = 97 <= train <= 99 and 0.5 <= val <= 1.5
    return Finding(of_fact(holds), f"{train:.2f} % and {val:.2f} % of {number(total)} documents")


def measure_held_out(results: Results) -> Finding:
    found, items = results.value("tokens.benchmark_items_in_train"), results.value("tokens.benchmark_items")
    return Finding(of_fact(found == 0), f"{number(found)} of {number(items)} items found in training documents")


def measure_steps(results: Results) -> Finding:
    steps, size = results.value("train.steps"), results.value("train.tokens_per_step")
    holds = steps >= REFERENCE_STEPS and size == REFERENCE_TOKENS_PER_STEP
    measured = f"{number(steps)} steps of {number(size)} tokens, {number(results.value('train.epochs'))} epochs"
    return Finding(of_fact(holds), measured)


def measure_convergence(results: Results) -> Finding:
    falls = results.over_models("train.val_loss_late_fall_percent")
    broken = [bool(model.value("train.stalled") or model.value("train.diverged")) for model in results.models]
    measured = (
        f"validation loss {spread(results.over_models('train.val_loss'))}; it falls by "
        f"{spread(falls, unit=' %')} over the last fifth; {sum(broken)} of {len(broken)} models stalled or diverged"
    )
    if any(broken):
        return Finding("failed" if all(broken) else "undecided", measured)
    return Finding(of_margins([MAX_LATE_FALL_PERCENT - fall for fall in falls]), measured)


def measure_learning(results: Results) -> Finding:
    losses, entropy = results.over_models("train.val_loss"), results.value("train.unigram_entropy")
    measured = f"{spread(losses)} nats, unigram entropy {number(entropy)}"
    return Finding(of_margins([entropy - loss for loss in losses]), measured)


def measure_validation_loss(results: Results) -> Finding:
    losses, encoding = results.over_models("train.val_loss"), results.value("tokens.encoding")
    if encoding != GPT2_VOCABULARY:
        return Finding("untested", f"{spread(losses)} nats per token of {encoding}, another unit")
    return Finding(
        of_margins([REFERENCE_VAL_LOSS - loss for loss in losses]), f"{spread(losses)} nats per token on this corpus"
    )


def measure_rising(results: Results) -> Finding:
    if any(model.value("train.hellaswag_evaluations") < 3 for model in results.models):
        # A run that broke off was not too short by design.
        broken = any(results.over_models("train.diverged"))
        return Finding("failed" if broken else "untested", "fewer than the 3 evaluations needed")
    rises, margins, correlations = [], [], []
    for model in results.models:
        first, last = (model.value(f"train.hellaswag_{which}acc_norm") for which in ("first_", ""))
        # Of a difference of two accuracies. The items are the same, which makes the bound stricter than its name.
        noise = math.sqrt(2) * _standard_error(model)
        correlation = model.value("train.hellaswag_rank_correlation")
        rises.append(100 * (last - first))
        correlations.append(correlation)
        margins.append(last - first - 2 * noise if correlation > 0 else min(0.0, last - first))
    measured = f"{spread(rises, ' points', '+')}; rank correlation with the step {spread(correlations)}"
    return Finding(of_margins(margins), measured)


def _standard_error(model: Model) -> float:
    """Of acc_norm during training, which may use fewer items than the stage hellaswag."""
    items, used = model.value("hellaswag.items"), model.value("train.hellaswag_items")
    return model.value("hellaswag.completion_acc_norm_stderr") * math.sqrt(items / used)


def measure_above_chance(results: Results) -> Finding:
    key = "hellaswag.completion_acc_norm"
    accuracies, errors = results.over_models(key), results.over_models(f"{key}_stderr")
    margins = [accuracy - HELLASWAG_CHANCE - 3 * error for accuracy, error in zip(accuracies, errors, strict=True)]
    measured = (
        f"{spread([100 * accuracy for accuracy in accuracies], unit=' %')} of "
        f"{number(results.value('hellaswag.items'))} items, standard error over documents "
        f"{number(100 * float(np.mean(errors)))} points"
    )
    return Finding(of_margins(margins), measured)


def measure_shuffling(results: Results) -> Finding:
    kept, windows = results.value("train.windows_in_same_place"), results.value("train.windows_per_epoch")
    measured = f"{number(kept)} of {number(windows)} windows keep their place in the next epoch"
    return Finding(of_fact(windows > 10 and kept <= 10), measured)


def measure_attention(results: Results) -> Finding:
    backend = results.value("train.attention_backend")
    return Finding(of_fact(str(backend).startswith(FUSED_ATTENTION)), f"backend `{backend}`")


def measure_smoothness(results: Results) -> Finding:
    columns = ["arm", "norm", "loss_spikes", "diverged", "stalled", "max_grad_norm"]
    runs = results.table("norm_study/runs.csv", columns)
    preln = runs[(runs["arm"] == MAIN_ARM) & (runs["norm"] == "preln")]
    if preln.empty:
        return Finding("untested", "preln was not studied")
    rough = preln["max_grad_norm"].fillna(np.inf) > MAX_GRAD_NORM
    faults = (preln["loss_spikes"] > 0) | (preln["diverged"] > 0) | (preln["stalled"] > 0) | rough
    measured = (
        f"{int(faults.sum())} of {len(preln)} runs in trouble: {int((preln['loss_spikes'] > 0).sum())} with spikes, "
        f"{int(preln['diverged'].sum())} diverged, {int(preln['stalled'].sum())} stalled, {int(rough.sum())} with a "
        f"gradient norm above {MAX_GRAD_NORM}; the largest is {number(preln['max_grad_norm'].max())}"
    )
    return Finding(of_trouble(int(faults.sum()), len(preln)), measured)


def measure_norms(results: Results, trouble: str) -> Finding:
    """Compare how often Post-LN and Pre-LN are `rough` (spike or diverge) or `lost` (stall or diverge)."""
    if not results.has(f"norm_study.postln_{trouble}_cmh_p"):
        return Finding("untested", "preln and postln were not studied at the same settings")
    p_value = results.value(f"norm_study.postln_{trouble}_cmh_p")
    (post, of_post), (pre, of_pre) = (
        [results.value(f"norm_study.{norm}_{key}") for key in (f"{trouble}_runs", "runs")]
        for norm in ("postln", "preln")
    )
    measured = (
        f"postln {post} of {of_post} runs, preln {pre} of {of_pre}; one-sided Cochran-Mantel-Haenszel "
        f"p = {number(p_value)}"
    )
    return Finding(of_comparison(p_value, post / of_post, pre / of_pre), measured)


def measure_similar_heads(results: Results) -> Finding:
    pairs = results.over_models("heads.redundant_pairs")
    highest = spread(results.over_models("heads.max_similarity"))
    left = spread(results.over_models("heads.uniform_heads_percent"), unit=" %")
    measured = f"{spread(pairs)} pairs; highest cosine {highest}; {left} of the heads still attend uniformly"
    return Finding(of_each([count > 0 for count in pairs]), measured)


def measure_beyond_null(results: Results, null: str) -> Finding:
    """Compare centred similarities with a null model's: the share of pairs above its percentile with the null's own."""
    shares = results.over_models(f"heads.pairs_above_{null}_centred_threshold_percent")
    pairs, percentile = results.value("heads.same_layer_pairs"), results.value("heads.null_percentile")
    # An interpolated percentile of n values lies below this many of them, more than the rest of 100 % if n is small.
    null_share = 100 * (pairs - 1 - math.floor(percentile / 100 * (pairs - 1))) / pairs
    own, other = (results.over_models(f"heads.{prefix}mean_centred_similarity") for prefix in ("", f"{null}_"))
    measured = (
        f"{spread(shares, unit=' %')} of the pairs are above the {percentile:g} % point of the {null} model, of its "
        f"own {number(null_share)} %; mean centred cosine {spread(own)}, {null} {spread(other)}"
    )
    return Finding(of_margins([share - null_share for share in shares]), measured)


def measure_middle(results: Results) -> Finding:
    pairs = results.over_models("heads.redundant_pairs")
    layers = results.value("heads.middle_layers_percent")
    shares = [
        model.value("heads.redundant_pairs_middle_percent")
        for model, count in zip(results.models, pairs, strict=True)
        if count
    ]
    if sum(pairs) < MIN_PAIRS:
        return Finding("untested", f"{number(int(sum(pairs)))} pairs in all models, too few to tell")
    measured = f"{spread(shares, unit=' %')} of {number(int(sum(pairs)))} pairs, in {layers:.1f} % of the layers"
    return Finding(of_margins([share - max(50.0, layers) for share in shares]), measured)


def rise_key(column: str) -> str:
    """The rise of perplexity in percent with 15 % of the heads removed."""
    return f"{pruning_prefix(column)}perplexity_rise_percent_at_15"


def most_key(column: str) -> str:
    """The largest share of the heads, in percent, whose removal raises perplexity by less than 5 %."""
    return f"{pruning_prefix(column)}max_pruned_percent_below_5"


def measure_pruning(results: Results, column: str) -> Finding:
    rises = results.over_models(rise_key(column))
    removed, heads = results.value("prune.heads_removed_at_15"), results.value("heads.heads")
    low, high = (results.value(f"{rise_key(column)}_{end}") for end in ("low", "high"))
    measured = f"{spread(rises, ' %', '+')} for {number(removed)} of {number(heads)} heads"
    if len(rises) == 1:
        verdict = of_interval(MAX_RISE_PERCENT - high, MAX_RISE_PERCENT - low)
        return Finding(verdict, f"{measured}, 95 % interval over documents {signed(low)} to {signed(high)} %")
    return Finding(of_margins([MAX_RISE_PERCENT - rise for rise in rises]), measured)


def measure_choice(results: Results) -> Finding:
    """Compare redundancy with random sets that take as many heads of each layer."""
    rises = results.over_models(rise_key("redundancy"))
    matched, free = (
        results.over_models(f"prune.{sets}random_sets_perplexity_rise_percent_at_15") for sets in ("matched_", "")
    )
    measured = (
        f"{spread(rises, ' %', '+')}; random sets of the same layers {spread(matched, ' %', '+')}, of any layers "
        f"{spread(free, ' %', '+')}"
    )
    if len(rises) == 1:
        cheaper = results.value("prune.cheaper_matched_random_sets_at_15")
        return _of_random_sets(cheaper, results.value("prune.matched_random_sets_at_15"), SIGNIFICANCE, measured)
    return Finding(of_margins(np.subtract(matched, rises).tolist()), measured)


def measure_similarity_choice(results: Results) -> Finding:
    """Compare the orders by similarity with random sets of any layers."""
    columns = {order: order if order == "redundancy" else f"similarity_{order}" for order in SIMILARITIES}
    if len(results.models) == 1:
        cheaper = {
            order: results.value(f"{pruning_prefix(column)}cheaper_random_sets_at_15")
            for order, column in columns.items()
        }
        best = min(cheaper, key=lambda order: (cheaper[order], results.value(rise_key(columns[order]))))
        measured = f"best of {len(columns)}: {SIMILARITIES[best]}, {signed(results.value(rise_key(columns[best])))} %"
        limit = SIGNIFICANCE / len(columns)
        return _of_random_sets(cheaper[best], results.value("prune.random_sets"), limit, measured)
    free = results.over_models("prune.random_sets_perplexity_rise_percent_at_15")
    margins = {
        order: np.subtract(free, results.over_models(rise_key(column))).tolist() for order, column in columns.items()
    }
    verdict, best = of_best(margins)
    rises = results.over_models(rise_key(columns[best]))
    measured = (
        f"best of {len(columns)}: {SIMILARITIES[best]}, {spread(rises, ' %', '+')}; random sets "
        f"{spread(free, ' %', '+')}"
    )
    return Finding(verdict, measured)


def _of_random_sets(cheaper: int, sets: int, limit: float, measured: str) -> Finding:
    """Verdict of a permutation test on one model: (1 + cheaper) / (1 + sets) must be at most `limit`."""
    measured = f"{measured}; {number(cheaper)} of {number(sets)} random sets cost less (one model)"
    if 1 / (1 + sets) > limit:
        return Finding("untested", f"{measured}, too few sets to tell")
    return Finding(of_fact((1 + cheaper) / (1 + sets) <= limit), measured)


def measure_repair(results: Results) -> Finding:
    """Compare redundancy with and without its best repair, in the share of heads that can go."""
    plain = results.over_models(most_key("redundancy"))
    columns = [f"redundancy_{repair}" for repair in REPAIRS_OF_REDUNDANCY]
    repaired = [max(model.value(most_key(column)) for column in columns) for model in results.models]
    # Twice nothing is no gain: at least one head counts.
    one_head = 100 / results.value("heads.heads")
    margins = [
        after - REPAIR_GAIN * max(before, one_head) + one_head / 2
        for after, before in zip(repaired, plain, strict=True)
    ]
    measured = f"{spread(repaired, unit=' %')} with the best repair, {spread(plain, unit=' %')} without"
    return Finding(of_margins(margins), measured)


def measure_effect(results: Results, column: str, unit: str) -> Finding:
    """The effect of the vocabulary size on counts that a nested, larger vocabulary can only improve."""
    vocabularies = load_vocabularies(results)
    own = vocabularies[vocabularies["own"]]
    first, last = own.iloc[0], own.iloc[-1]
    change = 100 * (last[column] / first[column] - 1)
    return Finding(
        "by construction",
        f"{number(first[column])} to {number(last[column])} {unit} ({change:+.1f} %) from "
        f"{number(int(first['vocab_size']))} to {number(int(last['vocab_size']))} tokens of vocabulary",
    )


def measure_cost(results: Results) -> Finding:
    effect = measure_effect(results, "flops_per_byte", "FLOPs per byte")
    width, n_embd = results.value("tokenizer.cheaper_above_n_embd"), results.setting("model", "n_embd")
    bound = f"cheaper for n_embd of {number(width)} or more" if width > 0 else "cheaper for no width"
    return Finding("by construction", f"{effect.measured} at n_embd = {n_embd}; {bound} at this depth")


def measure_vocabulary_runs(results: Results, column: str) -> Finding:
    """Compare the largest vocabulary with the smallest on equal computation, paired by seed."""
    runs = results.table("tokenizer/runs.csv", ["budget", "name", "vocab_size", "seed", "chosen", column])
    runs = runs[(runs["name"] != GPT2_VOCABULARY) & (runs["budget"] == runs["budget"].max()) & (runs["chosen"] == 1)]
    by_size = runs.pivot(index="seed", columns="vocab_size", values=column)
    small, large = by_size.columns.min(), by_size.columns.max()
    gains = (by_size[small] - by_size[large]).tolist()
    measured = (
        f"bits per byte {spread(by_size[large].tolist())} with {number(int(large))} tokens of vocabulary, "
        f"{spread(by_size[small].tolist())} with {number(int(small))}"
    ).replace("one model", "one seed")
    if small == large:
        return Finding("untested", f"{measured}; one size")
    if column.startswith("rare_"):
        table = results.table("tokenizer/runs_table.csv", ["budget", "vocab_size", column, "rare_even_bits_per_byte"])
        last = table[(table["budget"] == table["budget"].max()) & table["vocab_size"].isin([small, large])]
        if (last[column] >= last["rare_even_bits_per_byte"]).any():
            return Finding("untested", f"{measured}; a model is no better than guessing all tokens alike")
    return Finding(of_margins(gains), measured)


def measure_generation(results: Results) -> Finding:
    texts = results.texts("generate/samples.csv", ["prompt", "text"])["text"]
    written = sum(bool(text.strip()) for text in texts)
    return Finding(of_fact(0 < written == len(texts)), f"{written} of {len(texts)} prompts continued")


def measure_gpu_hours(results: Results) -> Finding:
    processes, hours = results.value("speed/train.processes"), results.value("speed/train.seconds") / 3600
    holds = 1 < processes <= REFERENCE_GPU_HOURS / hours
    return Finding(of_fact(holds), f"{number(hours)} h on {number(processes)} processes")
