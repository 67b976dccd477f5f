"""The reference project's claims as data: each with the figures that test it, the rule, and a verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gpt2.report import measures
from gpt2.report.markdown import number
from gpt2.report.measures import Finding
from gpt2.report.results import Results

Verdict = Literal["passed", "failed", "untested"]


@dataclass(frozen=True)
class Claim:
    """A sentence of the reference and its test.

    `rule` names the metrics and the bound, `check` measures and applies it. `scales` are those whose size and corpus
    let the rule be tested. `study` is the section of the report that discusses it (`run`: none). `of_training` says
    that only weights that were trained in this run can test it.
    """

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
    holds, measured = claim.check(results)
    if results.scale not in claim.scales:
        return Row(claim, f"{measured}; needs scale {' or '.join(claim.scales)}", "untested")
    if holds is None:
        return Row(claim, measured, "untested")
    return Row(claim, measured, "passed" if holds else "failed")


CLAIMS = (
    Claim(
        "run",
        "GPT-2 with 124M parameters",
        f"`train.n_params` = {number(measures.REFERENCE_PARAMS)}",
        measures.measure_parameters,
        scales=("short", "full"),
    ),
    Claim(
        "run",
        "Trained on FineWeb-Edu-10B",
        "`tokens.tokens_train` ≥ 9.5 billion, of FineWeb-Edu",
        measures.measure_corpus,
        scales=("full",),
        of_training=True,
    ),
    Claim(
        "run",
        "About 98 % of the documents train, 1 % validate",
        "`prepare.documents_*`: 97 to 99 % and 0.5 to 1.5 %",
        measures.measure_split,
    ),
    Claim(
        "run",
        "HellaSwag is held out of training",
        "`tokens.benchmark_items_in_train` = 0",
        measures.measure_held_out,
        of_training=True,
    ),
    Claim(
        "run",
        "95,365 steps of 0.5M tokens, about 5 epochs",
        f"`train.steps` ≥ {number(measures.REFERENCE_STEPS)}, "
        f"`train.tokens_per_step` = {number(measures.REFERENCE_TOKENS_PER_STEP)}",
        measures.measure_steps,
        scales=("full",),
        of_training=True,
    ),
    Claim(
        "training",
        "The training converges",
        "`train.val_loss` < `train.unigram_entropy`, neither `stalled` nor `diverged`",
        measures.measure_learning,
        of_training=True,
    ),
    Claim(
        "run",
        "Reproduces GPT-2 124M",
        f"`train.val_loss` ≤ {measures.REFERENCE_VAL_LOSS}, that of OpenAI's weights",
        measures.measure_validation_loss,
        scales=("full",),
        of_training=True,
    ),
    Claim(
        "training",
        "HellaSwag accuracy rises along training",
        "`hellaswag_acc_norm` in train/eval.csv: rank correlation with the step > 0, last ≥ first + 2 standard errors",
        measures.measure_rising,
        of_training=True,
    ),
    Claim(
        "training",
        "HellaSwag accuracy ends above chance",
        "`hellaswag.completion_acc_norm` > 25 % + 3 standard errors",
        measures.measure_above_chance,
    ),
    Claim(
        "run",
        "The windows are shuffled anew in each epoch",
        "`train.windows_in_same_place` ≤ 10 (chance leaves 1 in its place)",
        measures.measure_shuffling,
        of_training=True,
    ),
    Claim(
        "run",
        "FlashAttention",
        f"`train.attention_backend` begins with {', '.join(measures.FUSED_ATTENTION)}",
        measures.measure_attention,
    ),
    Claim(
        "norms",
        "Pre-LN trains smoothly",
        "preln in norm_study/table.csv: no `loss_spikes`, none `diverged`, none `stalled`, at any setting",
        measures.measure_smoothness,
    ),
    Claim(
        "norms",
        "Post-LN spikes or diverges where Pre-LN does not",
        "norm_study/table.csv has a setting with `loss_spikes` or `diverged` of postln, and none of preln",
        measures.measure_roughness,
    ),
    Claim(
        "norms",
        "Post-LN learns nothing (it stalls or diverges) at a learning rate and warm-up at which Pre-LN learns",
        "norm_study/table.csv has a setting at which all runs of postln `stalled` or `diverged`, and none of preln",
        measures.measure_failure,
    ),
    Claim(
        "heads",
        "Heads of the same layer have attention patterns with cosine similarity over 0.85",
        "`heads.redundant_pairs` > 0",
        measures.measure_similar_heads,
    ),
    Claim(
        "heads",
        "The similarity is learned: an untrained model, alike through the causal mask alone, has fewer such pairs",
        "`heads.redundant_pairs` > `heads.untrained_redundant_pairs`",
        measures.measure_beyond_null,
    ),
    Claim(
        "heads",
        "The similarity comes from reading text: on the same tokens shuffled the model has fewer such pairs",
        "`heads.redundant_pairs` > `heads.shuffled_redundant_pairs`",
        measures.measure_beyond_order,
    ),
    Claim(
        "heads",
        "Similar heads are mostly in the middle layers",
        "`heads.redundant_pairs_middle_percent` > 50 and > `heads.middle_layers_percent`",
        measures.measure_middle,
    ),
    *(
        Claim(
            "pruning",
            f"15 % of the heads cost less than 5 % of perplexity, chosen by {measures.CRITERIA[criterion]}",
            f"`{measures.pruning_key(criterion, 'perplexity_rise_percent_at_15')}` < {measures.MAX_RISE_PERCENT}",
            partial(measures.measure_pruning, column=criterion),
        )
        for criterion in measures.CHOSEN
    ),
    Claim(
        "pruning",
        "A repair without training lets twice the heads go that redundancy alone does, for under 5 % of perplexity",
        f"highest `prune.*_max_pruned_percent_below_5` with a repair ≥ {measures.REPAIR_GAIN} × "
        "`prune.max_pruned_percent_below_5`",
        measures.measure_repair,
    ),
    Claim(
        "pruning",
        "Redundancy tells which heads to remove",
        "`prune.perplexity_rise_percent_at_15` < `prune.random_perplexity_rise_percent_at_15`",
        measures.measure_choice,
    ),
    Claim(
        "pruning",
        "Some similarity of heads chooses 15 % of them better than chance, without repair",
        "for one of the orders (1 + `prune.*_cheaper_random_sets_at_15`) / (1 + `prune.random_sets`) ≤ "
        f"{measures.SIGNIFICANCE} / number of orders",
        measures.measure_similarity_choice,
    ),
    *(
        Claim(
            "vocabularies",
            f"A larger vocabulary splits {group} words less",
            f"`{group}_tokens_per_word` in tokenizer/vocabularies.csv falls from each size to the next",
            partial(measures.measure_vocabularies, column=f"{group}_tokens_per_word"),
        )
        for group in measures.WORD_GROUPS
    ),
    Claim(
        "vocabularies",
        "A larger vocabulary shortens sequences",
        "`bytes_per_token` in tokenizer/vocabularies.csv rises from each size to the next",
        partial(measures.measure_vocabularies, column="bytes_per_token", rising=True),
    ),
    Claim(
        "vocabularies",
        "A larger vocabulary makes training cheaper",
        "`flops_per_byte` in tokenizer/vocabularies.csv falls from each size to the next",
        partial(measures.measure_vocabularies, column="flops_per_byte"),
    ),
    *(
        Claim(
            "vocabularies",
            f"On the same computation, a larger vocabulary predicts {words} better",
            f"`{key}` in tokenizer/runs_table.csv, at the largest budget: highest seed of the largest size < lowest "
            "seed of the smallest",
            partial(measures.measure_vocabulary_runs, column=key),
        )
        for words, key in (("text", "bits_per_byte"), ("rare words", "rare_bits_per_byte"))
    ),
    Claim(
        "run",
        "The model generates text",
        "every prompt in generate/samples.csv is continued",
        measures.measure_generation,
    ),
)

# Apart from the others, because its figure differs from run to run.
TIMED_CLAIM = Claim(
    "run",
    "46 h on two A100 with DDP",
    f"`speed/train.seconds` times `processes` ≤ {measures.REFERENCE_GPU_HOURS} GPU-hours, more than one process",
    measures.measure_gpu_hours,
    scales=("full",),
    of_training=True,
)
