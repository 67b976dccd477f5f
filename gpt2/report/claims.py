"""The claims of the reference and of this project as data: a sentence, its rule, and the function that tests it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gpt2.report import measures
from gpt2.report.markdown import number
from gpt2.report.names import CRITERIA, WORD_GROUPS
from gpt2.report.results import Results
from gpt2.report.verdicts import SIGNIFICANCE, Finding, Verdict


@dataclass(frozen=True)
class Claim:
    """A sentence and its test.

    `key` names it in metrics/summary.json. `rule` names the figures and the bound, `check` measures and applies it.
    `scales` are those whose size and corpus let the rule be tested. `study` is the section of the report that discusses
    it (`run`: none). `of_training` says that only weights that were trained in this run can test it.
    """

    key: str
    study: Literal["run", "training", "norms", "vocabularies", "heads", "pruning"]
    sentence: str
    rule: str
    check: Callable[[Results], Finding]
    scales: tuple[str, ...] = ("tiny", "short", "full")
    of_training: bool = False


@dataclass(frozen=True)
class Row:
    """A claim as judged."""

    claim: Claim
    measured: str
    verdict: Verdict


def judge(claim: Claim, results: Results) -> Row:
    """Measure one claim and give the verdict.

    It is untested where the scale is not made to test it, the weights were not trained here, or the figures cannot say;
    the measured text gives the reason. Raises UserError naming file and key if a metric is missing.
    """
    if claim.of_training and results.loaded_from:
        return Row(claim, "needs a training run; the weights were loaded", "untested")
    verdict, measured = claim.check(results)
    if results.scale not in claim.scales:
        return Row(claim, f"{measured}; needs scale {' or '.join(claim.scales)}", "untested")
    return Row(claim, measured, verdict)


ON_MODELS = "95 % t interval over models"
CLAIMS = (
    Claim(
        "parameters",
        "run",
        "GPT-2 with 124M parameters",
        f"`train.n_params` = {number(measures.REFERENCE_PARAMS)}",
        measures.measure_parameters,
        scales=("short", "full"),
    ),
    Claim(
        "corpus",
        "run",
        "Trained on FineWeb-Edu-10B",
        "`tokens.tokens_train` ≥ 9.5 billion, of FineWeb-Edu",
        measures.measure_corpus,
        scales=("full",),
        of_training=True,
    ),
    Claim(
        "split",
        "run",
        "About 98 % of the documents train, 1 % validate",
        "`prepare.documents_*`: 97 to 99 % and 0.5 to 1.5 %",
        measures.measure_split,
    ),
    Claim(
        "held_out",
        "run",
        "HellaSwag is held out of training",
        "`tokens.benchmark_items_in_train` = 0",
        measures.measure_held_out,
        of_training=True,
    ),
    Claim(
        "steps",
        "run",
        "95,365 steps of 0.5M tokens, about 5 epochs",
        f"`train.steps` ≥ {number(measures.REFERENCE_STEPS)}, `train.tokens_per_step` = "
        f"{number(measures.REFERENCE_TOKENS_PER_STEP)}",
        measures.measure_steps,
        scales=("full",),
        of_training=True,
    ),
    Claim(
        "learns",
        "training",
        "The model learns more than the frequencies of tokens",
        f"`train.unigram_entropy` − `train.val_loss` > 0: {ON_MODELS}",
        measures.measure_learning,
        of_training=True,
    ),
    Claim(
        "converges",
        "training",
        "The training converges",
        f"`train.val_loss_late_fall_percent` < {measures.MAX_LATE_FALL_PERCENT}: {ON_MODELS}; no model `stalled` or "
        "`diverged`",
        measures.measure_convergence,
        of_training=True,
    ),
    Claim(
        "reproduces",
        "run",
        "Reproduces GPT-2 124M",
        f"`train.val_loss` < {measures.REFERENCE_VAL_LOSS}, that of OpenAI's weights: {ON_MODELS}",
        measures.measure_validation_loss,
        scales=("full",),
        of_training=True,
    ),
    Claim(
        "hellaswag_rises",
        "training",
        "HellaSwag accuracy rises along training",
        "`train.hellaswag_acc_norm` − `train.hellaswag_first_acc_norm` − 2 standard errors > 0, rank correlation with "
        f"the step > 0: {ON_MODELS}",
        measures.measure_rising,
        of_training=True,
    ),
    Claim(
        "hellaswag_above_chance",
        "training",
        "HellaSwag accuracy ends above chance",
        f"`hellaswag.completion_acc_norm` − 25 % − 3 standard errors over documents > 0: {ON_MODELS}",
        measures.measure_above_chance,
    ),
    Claim(
        "shuffling",
        "run",
        "The windows are shuffled anew in each epoch",
        "`train.windows_in_same_place` ≤ 10 (chance leaves 1 in its place)",
        measures.measure_shuffling,
        of_training=True,
    ),
    Claim(
        "flash_attention",
        "run",
        "FlashAttention",
        f"`train.attention_backend` begins with {', '.join(measures.FUSED_ATTENTION)}",
        measures.measure_attention,
    ),
    Claim(
        "preln_smooth",
        "norms",
        "Pre-LN trains smoothly",
        "preln in norm_study/runs.csv, main arm: passed if no run spikes, diverges, stalls or has a gradient norm "
        f"above {measures.MAX_GRAD_NORM}; failed if more than 10 % do by the exact 95 % interval",
        measures.measure_smoothness,
    ),
    Claim(
        "postln_rough",
        "norms",
        "Post-LN spikes or diverges more often than Pre-LN",
        f"one-sided Cochran-Mantel-Haenszel test over all runs of the main arm, by setting: p ≤ {SIGNIFICANCE}",
        partial(measures.measure_norms, trouble="rough"),
    ),
    Claim(
        "postln_lost",
        "norms",
        "Post-LN learns nothing (it stalls or diverges) more often than Pre-LN",
        f"one-sided Cochran-Mantel-Haenszel test over all runs of the main arm, by setting: p ≤ {SIGNIFICANCE}",
        partial(measures.measure_norms, trouble="lost"),
    ),
    Claim(
        "similar_heads",
        "heads",
        "Heads of the same layer have attention patterns with cosine similarity over 0.85",
        "`heads.redundant_pairs` > 0 in every model (failed: in none)",
        measures.measure_similar_heads,
    ),
    Claim(
        "similarity_learned",
        "heads",
        "The similarity is learned: centred patterns are more alike than an untrained model's",
        f"`heads.pairs_above_untrained_centred_threshold_percent` > that of the null model itself: {ON_MODELS}",
        partial(measures.measure_beyond_null, null="untrained"),
    ),
    Claim(
        "similarity_from_text",
        "heads",
        "The similarity comes from reading text: centred patterns are more alike than on shuffled tokens",
        f"`heads.pairs_above_shuffled_centred_threshold_percent` > that of the null model itself: {ON_MODELS}",
        partial(measures.measure_beyond_null, null="shuffled"),
    ),
    Claim(
        "similarity_in_middle",
        "heads",
        "Similar heads are mostly in the middle layers",
        "`heads.redundant_pairs_middle_percent` > 50 and > `heads.middle_layers_percent`: "
        f"{ON_MODELS}; untested below {measures.MIN_PAIRS} pairs in all",
        measures.measure_middle,
    ),
    *(
        Claim(
            f"prune_{criterion}",
            "pruning",
            f"15 % of the heads cost less than 5 % of perplexity, chosen by {name}",
            f"`{measures.rise_key(criterion)}` < {measures.MAX_RISE_PERCENT}: {ON_MODELS}; of one model its interval "
            "over documents",
            partial(measures.measure_pruning, column=criterion),
        )
        for criterion, name in CRITERIA.items()
        if criterion != "random"
    ),
    Claim(
        "repair",
        "pruning",
        "A repair without training lets twice the heads go, for under 5 % of perplexity",
        f"largest `prune.redundancy_*_max_pruned_percent_below_5` of a repair ≥ {measures.REPAIR_GAIN} × "
        f"`prune.max_pruned_percent_below_5`: {ON_MODELS}",
        measures.measure_repair,
    ),
    Claim(
        "redundancy_chooses",
        "pruning",
        "Redundancy shows which heads of a layer to remove",
        "`prune.perplexity_rise_percent_at_15` < `prune.matched_random_sets_perplexity_rise_percent_at_15`, of random "
        f"sets with as many heads of each layer: {ON_MODELS}",
        measures.measure_choice,
    ),
    Claim(
        "similarity_chooses",
        "pruning",
        "Some similarity of heads chooses 15 % of them better than chance, without repair",
        "for one of the orders `prune.*_perplexity_rise_percent_at_15` < "
        f"`prune.random_sets_perplexity_rise_percent_at_15`: {ON_MODELS}, Bonferroni over the orders",
        measures.measure_similarity_choice,
    ),
    *(
        Claim(
            f"splits_{group}_words",
            "vocabularies",
            f"A larger vocabulary splits {group} words less",
            f"`{group}_tokens_per_word` in tokenizer/vocabularies.csv; nested vocabularies can only split less",
            partial(measures.measure_effect, column=f"{group}_tokens_per_word", unit="tokens per word"),
        )
        for group in WORD_GROUPS
    ),
    Claim(
        "shortens_sequences",
        "vocabularies",
        "A larger vocabulary shortens sequences",
        "`bytes_per_token` in tokenizer/vocabularies.csv; nested vocabularies can only merge more",
        partial(measures.measure_effect, column="bytes_per_token", unit="bytes per token"),
    ),
    Claim(
        "cheaper_training",
        "vocabularies",
        "A larger vocabulary makes training cheaper",
        "`flops_per_byte` in tokenizer/vocabularies.csv; a matter of the model's width",
        measures.measure_cost,
    ),
    *(
        Claim(
            f"predicts_{name}",
            "vocabularies",
            f"On the same computation, a larger vocabulary predicts {words} better",
            f"`{key}` in tokenizer/runs.csv, largest budget: smallest − largest size > 0, paired by seed, t interval"
            + (
                "; untested where a model is no better than guessing all tokens alike" if key.startswith("rare") else ""
            ),
            partial(measures.measure_vocabulary_runs, column=key),
        )
        for name, words, key in (
            ("text", "text", "bits_per_byte"),
            ("rare_words", "rare words", "rare_bits_per_byte"),
        )
    ),
    Claim(
        "generates",
        "run",
        "The model generates text",
        "every prompt in generate/samples.csv is continued",
        measures.measure_generation,
    ),
)

# Apart from the others, because its figure differs from run to run.
TIMED_CLAIM = Claim(
    "gpu_hours",
    "run",
    "46 h on two A100 with DDP",
    f"`speed/train.seconds` times `processes` ≤ {measures.REFERENCE_GPU_HOURS} GPU-hours, more than one process",
    measures.measure_gpu_hours,
    scales=("full",),
    of_training=True,
)
