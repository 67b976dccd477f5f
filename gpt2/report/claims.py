"""The checks of the claims in claims.csv.j2.

Each returns a verdict, by a rule of verdicts.py, and what was measured as text, which says if it is of one model.
"""

import io
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

from gpt2.report import verdicts
from gpt2.report.markdown import load_template, number, write_spread
from gpt2.report.names import GPT2_VOCABULARY, MAIN_ARM, SIMILARITIES, pruning_prefix
from gpt2.report.results import Results
from gpt2.report.tables import load_vocabularies
from gpt2.report.verdicts import SIGNIFICANCE, Verdict, of_fact, of_margins

REFERENCE_PARAMS = 124_439_808
REFERENCE_STEPS = 95_365
REFERENCE_TOKENS_PER_STEP = 524_288
REFERENCE_GPU_HOURS = 2 * 46
# The loss of OpenAI's weights on the validation shard of FineWeb-Edu (build-nanogpt).
REFERENCE_VAL_LOSS = 3.2924
# The largest acceptable rise of perplexity without 15 % of the heads.
MAX_RISE_PERCENT = 5
# Training has levelled off if the validation loss falls by less than this over the last fifth of the steps.
MAX_LATE_FALL_PERCENT = 1
# The largest gradient norm of a smooth run, where gradients are clipped at 1.
MAX_GRAD_NORM = 100
# The fewest pairs of similar heads that show in which layers such pairs are.
MIN_PAIRS = 20
# A repair has to remove this many times the heads that the criterion removes alone.
REPAIR_GAIN = 2
# One of four endings is right.
HELLASWAG_CHANCE = 0.25
# Attention kernels that never hold a T x T matrix of scores.
FUSED_ATTENTION = ("flash", "cudnn", "efficient")
# The claim whose figure differs from run to run.
TIMED_CLAIM = "gpu_hours"
ON_MODELS = "95 % t interval over models"

Finding = tuple[Verdict, str]
CHECKS: dict[str, Callable[[Results], Finding]] = {}


def check(key: str, **options: str) -> Callable:
    """Register the decorated function, called with `options`, as the check of a claim."""

    def register(function: Callable[..., Finding]) -> Callable[..., Finding]:
        CHECKS[key] = partial(function, **options)
        return function

    return register


def spread(values: np.ndarray, unit: str = "", sign: str = "") -> str:
    """Mean ± sample standard deviation (number of models) in words; of one model its value."""
    if len(values) > 1:
        return write_spread(pd.Series(values), unit, sign)
    return f"{values[0]:+.2f}{unit} (one model)" if sign else f"{number(values[0])}{unit} (one model)"


@check("parameters")
def measure_parameters(results: Results) -> Finding:
    found = results.value("train.n_params")
    return of_fact(found == REFERENCE_PARAMS), f"{number(found)} parameters"


@check("corpus")
def measure_corpus(results: Results) -> Finding:
    source, tokens = results.setting("prepare", "source"), results.value("tokens.tokens_train")
    holds = source == "fineweb_edu" and tokens >= 9.5e9
    return of_fact(holds), f"{number(tokens)} training tokens from source `{source}`"


@check("split")
def measure_split(results: Results) -> Finding:
    train, val, test = (results.value(f"prepare.documents_{split}") for split in ("train", "val", "test"))
    total = train + val + test
    train, val = 100 * train / total, 100 * val / total
    holds = 97 <= train <= 99 and 0.5 <= val <= 1.5
    return of_fact(holds), f"{train:.2f} % and {val:.2f} % of {number(total)} documents"


@check("held_out")
def measure_held_out(results: Results) -> Finding:
    found, items = results.value("tokens.benchmark_items_in_train"), results.value("tokens.benchmark_items")
    return of_fact(found == 0), f"{number(found)} of {number(items)} items found in training documents"


@check("steps")
def measure_steps(results: Results) -> Finding:
    found, size, epochs = (results.value(f"train.{key}") for key in ("steps", "tokens_per_step", "epochs"))
    holds = found >= REFERENCE_STEPS and size == REFERENCE_TOKENS_PER_STEP
    return of_fact(holds), f"{number(found)} steps of {number(size)} tokens, {number(epochs)} epochs"


@check("learns")
def measure_learning(results: Results) -> Finding:
    losses, entropy = results.over_models("train.val_loss"), results.value("train.unigram_entropy")
    return of_margins(entropy - losses), f"{spread(losses)} nats, unigram entropy {number(entropy)}"


@check("converges")
def measure_convergence(results: Results) -> Finding:
    losses, falls, stalled, diverged = (
        results.over_models(f"train.{key}") for key in ("val_loss", "val_loss_late_fall_percent", "stalled", "diverged")
    )
    broken = (stalled != 0) | (diverged != 0)
    measured = (
        f"validation loss {spread(losses)}; it falls by {spread(falls, ' %')} over the last fifth; "
        f"{broken.sum()} of {len(broken)} models stalled or diverged"
    )
    if broken.any():
        return "failed" if broken.all() else "undecided", measured
    return of_margins(MAX_LATE_FALL_PERCENT - falls), measured


@check("reproduces")
def measure_validation_loss(results: Results) -> Finding:
    losses, encoding = results.over_models("train.val_loss"), results.value("tokens.encoding")
    if encoding != GPT2_VOCABULARY:
        return "untested", f"{spread(losses)} nats per token of {encoding}, another unit"
    return of_margins(REFERENCE_VAL_LOSS - losses), f"{spread(losses)} nats per token on this corpus"


@check("hellaswag_rises")
def measure_rising(results: Results) -> Finding:
    if (results.over_models("train.hellaswag_evaluations") < 3).any():
        # A run that diverged was not too short by design.
        broken = results.over_models("train.diverged").any()
        return "failed" if broken else "untested", "fewer than the 3 evaluations needed"
    rises = results.over_models("train.hellaswag_acc_norm") - results.over_models("train.hellaswag_first_acc_norm")
    correlations = results.over_models("train.hellaswag_rank_correlation")
    # Training may evaluate fewer items than the stage hellaswag.
    shares = results.over_models("train.hellaswag_items") / results.over_models("hellaswag.items")
    errors = results.over_models("hellaswag.completion_acc_norm_stderr") / np.sqrt(shares)
    # sqrt(2) for a difference of two accuracies. The items are the same, which makes the bound stricter than its name.
    margins = np.where(correlations > 0, rises - 2 * math.sqrt(2) * errors, np.fmin(0, rises))
    measured = f"{spread(100 * rises, ' points', '+')}; rank correlation with the step {spread(correlations)}"
    return of_margins(margins), measured


@check("hellaswag_above_chance")
def measure_above_chance(results: Results) -> Finding:
    accuracies, errors = (results.over_models(f"hellaswag.completion_acc_norm{end}") for end in ("", "_stderr"))
    measured = (
        f"{spread(100 * accuracies, ' %')} of {number(results.value('hellaswag.items'))} items, standard error "
        f"over documents {number(100 * float(np.mean(errors)))} points"
    )
    return of_margins(accuracies - HELLASWAG_CHANCE - 3 * errors), measured


@check("shuffling")
def measure_shuffling(results: Results) -> Finding:
    kept, windows = results.value("train.windows_in_same_place"), results.value("train.windows_per_epoch")
    measured = f"{number(kept)} of {number(windows)} windows keep their place in the next epoch"
    return of_fact(windows > 10 and kept <= 10), measured


@check("flash_attention")
def measure_attention(results: Results) -> Finding:
    backend = results.value("train.attention_backend")
    return of_fact(str(backend).startswith(FUSED_ATTENTION)), f"backend `{backend}`"


@check("preln_smooth")
def measure_smoothness(results: Results) -> Finding:
    faults = ["loss_spikes", "diverged", "stalled"]
    runs = results.table("norm_study/runs.csv", ["arm", "norm", *faults, "max_grad_norm"])
    runs = runs[(runs["arm"] == MAIN_ARM) & (runs["norm"] == "preln")]
    if runs.empty:
        return "untested", "preln was not studied"
    troubled = (runs[faults] > 0).assign(rough=runs["max_grad_norm"].fillna(np.inf) > MAX_GRAD_NORM)
    spikes, diverged, stalled, rough = troubled.sum()
    measured = (
        f"{troubled.any(axis=1).sum()} of {len(runs)} runs in trouble: {spikes} with spikes, {diverged} diverged, "
        f"{stalled} stalled, {rough} with a gradient norm above {MAX_GRAD_NORM}; the largest is "
        f"{number(runs['max_grad_norm'].max())}"
    )
    return verdicts.of_trouble(int(troubled.any(axis=1).sum()), len(runs)), measured


@check("postln_rough", trouble="rough")
@check("postln_lost", trouble="lost")
def measure_norms(results: Results, trouble: str) -> Finding:
    """Compare how often Post-LN and Pre-LN are `rough` (spike or diverge) or `lost` (stall or diverge)."""
    if not results.has(f"norm_study.postln_{trouble}_cmh_p"):
        return "untested", "preln and postln were not studied at the same settings"
    p_value = results.value(f"norm_study.postln_{trouble}_cmh_p")
    post, pre = (results.value(f"norm_study.{norm}_{trouble}_runs") for norm in ("postln", "preln"))
    of_post, of_pre = (results.value(f"norm_study.{norm}_runs") for norm in ("postln", "preln"))
    test = f"one-sided Cochran-Mantel-Haenszel p = {number(p_value)}"
    measured = f"postln {post} of {of_post} runs, preln {pre} of {of_pre}; {test}"
    return verdicts.of_comparison(p_value, post / of_post, pre / of_pre), measured


@check("similar_heads")
def measure_similar_heads(results: Results) -> Finding:
    pairs, highest, uniform = (
        results.over_models(f"heads.{key}") for key in ("redundant_pairs", "max_similarity", "uniform_heads_percent")
    )
    measured = f"{spread(pairs)} pairs; highest cosine {spread(highest)}; {spread(uniform, ' %')} of the heads still"
    return verdicts.of_each(pairs > 0), f"{measured} attend uniformly"


@check("similarity_learned", null="untrained")
@check("similarity_from_text", null="shuffled")
def measure_beyond_null(results: Results, null: str) -> Finding:
    """Compare centred similarities with a null model's: the share of pairs above its percentile with the null's own."""
    shares = results.over_models(f"heads.pairs_above_{null}_centred_threshold_percent")
    pairs, percentile = results.value("heads.same_layer_pairs"), results.value("heads.null_percentile")
    # An interpolated percentile of n values lies below this many of them, more than the rest of 100 % if n is small.
    null_share = 100 * (pairs - 1 - math.floor(percentile / 100 * (pairs - 1))) / pairs
    own, other = (results.over_models(f"heads.{prefix}mean_centred_similarity") for prefix in ("", f"{null}_"))
    measured = (
        f"{spread(shares, ' %')} of the pairs are above the {percentile:g} % point of the {null} model, of its "
        f"own {number(null_share)} %; mean centred cosine {spread(own)}, {null} {spread(other)}"
    )
    return of_margins(shares - null_share), measured


@check("similarity_in_middle")
def measure_middle(results: Results) -> Finding:
    pairs, layers = results.over_models("heads.redundant_pairs"), results.value("heads.middle_layers_percent")
    shares = results.over_models("heads.redundant_pairs_middle_percent")[pairs > 0]
    total = number(int(pairs.sum()))
    if pairs.sum() < MIN_PAIRS:
        return "untested", f"{total} pairs in all models, too few to tell"
    measured = f"{spread(shares, ' %')} of {total} pairs, in {layers:.1f} % of the layers"
    return of_margins(shares - max(50.0, layers)), measured


def _rise_key(column: str) -> str:
    """The rise of perplexity in percent with 15 % of the heads removed, by a column of prune/frontier.csv."""
    return f"{pruning_prefix(column)}perplexity_rise_percent_at_15"


@check("prune_redundancy", column="redundancy")
@check("prune_taylor", column="taylor")
@check("prune_taylor_iterative", column="taylor_iterative")
@check("prune_magnitude", column="magnitude")
@check("prune_loss", column="loss")
def measure_pruning(results: Results, column: str) -> Finding:
    rises = results.over_models(_rise_key(column))
    removed, heads = results.value("prune.heads_removed_at_15"), results.value("heads.heads")
    low, high = (results.value(f"{_rise_key(column)}_{end}") for end in ("low", "high"))
    measured = f"{spread(rises, ' %', '+')} for {number(removed)} of {number(heads)} heads"
    if len(rises) == 1:
        verdict = verdicts.of_interval(MAX_RISE_PERCENT - high, MAX_RISE_PERCENT - low)
        return verdict, f"{measured}, 95 % interval over documents {low:+.2f} to {high:+.2f} %"
    return of_margins(MAX_RISE_PERCENT - rises), measured


@check("repair")
def measure_repair(results: Results) -> Finding:
    repairs = ("refit", "stepwise", "merge", "merge_refit")
    plain = results.over_models("prune.max_pruned_percent_below_5")
    best = np.max([results.over_models(f"prune.redundancy_{r}_max_pruned_percent_below_5") for r in repairs], axis=0)
    # Twice zero is no gain, so at least one head is required.
    one_head = 100 / results.value("heads.heads")
    margins = best - REPAIR_GAIN * np.maximum(plain, one_head) + one_head / 2
    return of_margins(margins), f"{spread(best, ' %')} with the best repair, {spread(plain, ' %')} without"


@check("redundancy_chooses")
def measure_choice(results: Results) -> Finding:
    rises, matched, free = (
        results.over_models(f"prune.{sets}perplexity_rise_percent_at_15")
        for sets in ("", "matched_random_sets_", "random_sets_")
    )
    ours, same, any_layers = (spread(values, " %", "+") for values in (rises, matched, free))
    measured = f"{ours}; random sets of the same layers {same}, of any layers {any_layers}"
    if len(rises) == 1:
        cheaper = results.value("prune.cheaper_matched_random_sets_at_15")
        return _test_on_one_model(cheaper, results.value("prune.matched_random_sets_at_15"), SIGNIFICANCE, measured)
    return of_margins(matched - rises), measured


@check("similarity_chooses")
def measure_similarity_choice(results: Results) -> Finding:
    columns = {order: order if order == "redundancy" else f"similarity_{order}" for order in SIMILARITIES}
    rises = {order: results.over_models(_rise_key(column)) for order, column in columns.items()}
    free = results.over_models("prune.random_sets_perplexity_rise_percent_at_15")
    verdict, best = verdicts.of_best({order: free - rise for order, rise in rises.items()})
    if len(free) > 1:
        measured = f"{SIMILARITIES[best]}, {spread(rises[best], ' %', '+')}; random sets {spread(free, ' %', '+')}"
        return verdict, f"best of {len(columns)}: {measured}"
    cheaper = {order: results.value(f"{pruning_prefix(c)}cheaper_random_sets_at_15") for order, c in columns.items()}
    best = min(cheaper, key=lambda order: (cheaper[order], rises[order][0]))
    measured = f"best of {len(columns)}: {SIMILARITIES[best]}, {rises[best][0]:+.2f} %"
    return _test_on_one_model(cheaper[best], results.value("prune.random_sets"), SIGNIFICANCE / len(columns), measured)


def _test_on_one_model(cheaper: int, sets: int, limit: float, measured: str) -> Finding:
    """Permutation test on one model: (1 + cheaper) / (1 + sets) must be at most `limit`."""
    measured = f"{measured}; {number(cheaper)} of {number(sets)} random sets cost less (one model)"
    if 1 / (1 + sets) > limit:
        return "untested", f"{measured}, too few sets to tell"
    return of_fact((1 + cheaper) / (1 + sets) <= limit), measured


@check("splits_rare_words", column="rare_tokens_per_word", unit="tokens per word")
@check("splits_compound_words", column="compound_tokens_per_word", unit="tokens per word")
@check("splits_technical_words", column="technical_tokens_per_word", unit="tokens per word")
@check("shortens_sequences", column="bytes_per_token", unit="bytes per token")
def measure_effect(results: Results, column: str, unit: str) -> Finding:
    """The effect of the vocabulary size on counts that a nested, larger vocabulary can only improve."""
    own = load_vocabularies(results).query("own")
    before, after = own[column].iloc[[0, -1]]
    small, large = own["vocab_size"].iloc[[0, -1]]
    effect = f"{number(before)} to {number(after)} {unit} ({100 * (after / before - 1):+.1f} %)"
    return "by construction", f"{effect} from {number(small)} to {number(large)} tokens of vocabulary"


@check("cheaper_training")
def measure_cost(results: Results) -> Finding:
    verdict, measured = measure_effect(results, "flops_per_byte", "FLOPs per byte")
    width, n_embd = results.value("tokenizer.cheaper_above_n_embd"), results.setting("model", "n_embd")
    bound = f"cheaper for n_embd of {number(width)} or more" if width > 0 else "cheaper for no width"
    return verdict, f"{measured} at n_embd = {n_embd}; {bound} at this depth"


@check("predicts_text", column="bits_per_byte")
@check("predicts_rare_words", column="rare_bits_per_byte")
def measure_vocabulary_runs(results: Results, column: str) -> Finding:
    """Compare the largest vocabulary with the smallest on equal computation, paired by seed."""
    runs = results.table("tokenizer/runs.csv", ["budget", "name", "vocab_size", "seed", "chosen", column])
    runs = runs[(runs["name"] != GPT2_VOCABULARY) & (runs["budget"] == runs["budget"].max()) & (runs["chosen"] == 1)]
    by_size = runs.pivot(index="seed", columns="vocab_size", values=column)
    small, large = by_size.columns.min(), by_size.columns.max()
    measured = (
        f"bits per byte {spread(by_size[large].to_numpy())} with {number(int(large))} tokens of vocabulary, "
        f"{spread(by_size[small].to_numpy())} with {number(int(small))}"
    ).replace("one model", "one seed")
    if small == large:
        return "untested", f"{measured}; one size"
    if column.startswith("rare_"):
        table = results.table("tokenizer/runs_table.csv", ["budget", "vocab_size", column, "rare_even_bits_per_byte"])
        last = table[(table["budget"] == table["budget"].max()) & table["vocab_size"].isin([small, large])]
        if (last[column] >= last["rare_even_bits_per_byte"]).any():
            return "untested", f"{measured}; a model is no better than guessing all tokens alike"
    return of_margins((by_size[small] - by_size[large]).to_numpy()), measured


@check("generates")
def measure_generation(results: Results) -> Finding:
    texts = results.texts("generate/samples.csv", ["prompt", "text"])["text"]
    written = sum(bool(text.strip()) for text in texts)
    return of_fact(0 < written == len(texts)), f"{written} of {len(texts)} prompts continued"


@check("gpu_hours")
def measure_gpu_hours(results: Results) -> Finding:
    processes, hours = results.value("speed/train.processes"), results.value("speed/train.seconds") / 3600
    holds = 1 < processes <= REFERENCE_GPU_HOURS / hours
    return of_fact(holds), f"{number(hours)} h on {number(processes)} processes"


# A row per key, with the columns of claims.csv.j2 as text. Its rules name the bounds above.
_TABLE = io.StringIO(load_template("claims.csv.j2").render(globals()))
CLAIMS = pd.read_csv(_TABLE, sep="|", index_col="key", dtype=str, keep_default_na=False)


def judge(key: str, results: Results) -> Finding:
    """Measure one claim and give the verdict.

    It is untested where the scale is not made to test it, the weights were not trained here, or the figures cannot say;
    the measured text gives the reason. Raises UserError naming file and key if a metric is missing.
    """
    claim = CLAIMS.loc[key]
    if claim["of_training"] and results.loaded_from:
        return "untested", "needs a training run; the weights were loaded"
    verdict, measured = CHECKS[key](results)
    scales = claim["scales"].split()
    if scales and results.scale not in scales:
        return "untested", f"{measured}; needs scale {' or '.join(scales)}"
    return verdict, measured


def judge_claims(results: Results, timed: bool = False) -> pd.DataFrame:
    """CLAIMS with the columns verdict and measured: all but the one on measured time, or that one only."""
    claims = CLAIMS[(CLAIMS.index == TIMED_CLAIM) == timed]
    findings = [judge(str(key), results) for key in claims.index]
    return claims.assign(verdict=[verdict for verdict, _ in findings], measured=[measured for _, measured in findings])
