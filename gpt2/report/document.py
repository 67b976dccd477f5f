"""The report of a run: results beside the reference's, claims with verdicts, the studies, and what the run cost."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from gpt2.report import sections as studies
from gpt2.report.claims import CLAIMS, TIMED_CLAIM, Row, judge
from gpt2.report.markdown import number, table
from gpt2.report.measures import REFERENCE_ENCODING, REFERENCE_PARAMS, REFERENCE_STEPS, REFERENCE_VAL_LOSS, rise_at_15
from gpt2.report.results import Results
from gpt2.report.vocabulary_section import describe_vocabularies

HELLASWAG_ITEMS = 10_042
STUDIES = {
    "training": ("Training", studies.describe_training),
    "norms": ("Placement of the layer norm", studies.describe_norms),
    "vocabularies": ("Size of the vocabulary", describe_vocabularies),
    "heads": ("Similar attention heads", studies.describe_heads),
    "pruning": ("Pruning of heads", studies.describe_pruning),
}
TIMED_STAGES = (
    *("prepare", "benchmark", "tokenize", "tokenizer_study", "norm_study"),
    *("train", "hellaswag", "generate", "head_similarity", "prune"),
)
# Figures of models by themselves, which have a table of their own.
PRUNED_MODELS = ("heads_removed_", "pruned_")
PACKAGES = ("torch", "numpy", "tiktoken", "tokenizers", "pyarrow")


def write_report(results: Results, figures: Mapping[str, str]) -> str:
    """The report as Markdown; `figures` gives the link of each figure by name.

    All but the last section depends on metrics and curves alone, the last on measured times. Raises UserError naming
    file and key if a metric, column or file is missing.
    """
    rows = [judge(claim, results) for claim in CLAIMS]
    sections = {
        "Results beside the reference": _compare(results),
        "Claims": _list_claims(rows),
    }
    for study, (title, describe) in STUDIES.items():
        sections[title] = f"{describe(results, figures)}\n\n{studies.list_verdicts(rows, study)}"
    sections |= {
        "Generated text": studies.describe_samples(results),
        "How it was made": _describe_making(results),
        "Measured times": _list_times(results, figures),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{_summarise(results, rows)}\n\n{body}\n"


def _summarise(results: Results, rows: Sequence[Row]) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("passed", "failed", "untested")}
    return (
        f"# Report: scale `{results.scale}`, norm `{results.norm}`\n\n"
        f"Of {len(rows)} claims of the reference and of this project, {counts['passed']} passed, "
        f"{counts['failed']} failed and {counts['untested']} cannot be tested at this scale"
        f"{' with loaded weights' if results.loaded_from else ''}."
    )


def _compare(results: Results) -> str:
    value, openai = results.value, "OpenAI's GPT-2 124M"
    corpus = "yes" if results.setting("prepare", "source") == "fineweb_edu" else "no, other corpus"
    if value("tokens.encoding") != REFERENCE_ENCODING:
        corpus = "no, other vocabulary"
    items = "yes" if value("hellaswag.items") == HELLASWAG_ITEMS else "no, other items"
    size = "yes" if value("train.n_params") == REFERENCE_PARAMS else "no, other size"
    rise = f"{rise_at_15(results, 'redundancy'):+.2f} %"

    def accuracy(key: str) -> str:
        return f"{100 * value(f'hellaswag.{key}'):.2f} ± {100 * value(f'hellaswag.{key}_stderr'):.2f}"

    rows = [
        ("Parameters", number(value("train.n_params")), number(REFERENCE_PARAMS), openai, size),
        ("Validation loss (nats per token)", number(value("train.val_loss")), str(REFERENCE_VAL_LOSS), openai, corpus),
        ("Validation perplexity", number(value("train.val_perplexity")), "26.91", openai, corpus),
        ("Validation bits per byte", number(value("train.val_bits_per_byte")), "", "", ""),
        ("HellaSwag, completion acc (%)", accuracy("completion_acc"), "28.59", openai, items),
        ("HellaSwag, completion acc_norm (%)", accuracy("completion_acc_norm"), "29.55", openai, items),
        ("HellaSwag, harness acc (%)", accuracy("harness_acc"), "28.92", openai, items),
        ("HellaSwag, harness acc_norm (%)", accuracy("harness_acc_norm"), "31.14", openai, items),
        ("Steps", number(value("train.steps")), number(REFERENCE_STEPS), "reference run", ""),
        ("Rise of perplexity without 15 % of the heads", rise, "under +5 %", "reference run", corpus),
    ]
    return (
        table(("Figure", "This run", "Reference", "Of", "Comparable"), rows, "lrrll") + "\n\n"
        "Losses per token compare only on the same corpus with the same vocabulary: OpenAI's weights reach 3.2924 on "
        "FineWeb-Edu, 3.425 on FineWeb and 3.12 on OpenWebText. llm.c's run over 10B tokens of FineWeb ended at 3.2722 "
        "with 29.9 % on HellaSwag. From seed to seed the final loss deviates by 0.00088; less is no difference."
    )


def _list_claims(rows: Sequence[Row]) -> str:
    cells = [(row.claim.sentence, row.measured, row.claim.rule, f"**{row.verdict}**") for row in rows]
    return table(("Claim", "Measured", "Rule", "Verdict"), cells, "llll")


def _describe_making(results: Results) -> str:
    loaded = results.loaded_from
    origin = f"loaded from {studies.name_origin(results)}, not trained here" if loaded else "trained from scratch"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    settings = [
        (f"`{section}.{key}`", f"`{value}`")
        for section in ("model", "train")
        for key, value in results.settings[section].items()
    ]
    return (
        f"Scale `{results.scale}`, norm `{results.norm}`, corpus `{results.setting('prepare', 'source')}`, vocabulary "
        f"`{results.value('tokens.encoding')}`; the weights were {origin}. Python {platform.python_version()}, "
        f"{versions}.\n\n" + table(("Parameter", "Value"), settings, "ll")
    )


def _list_times(results: Results, figures: Mapping[str, str]) -> str:
    """Seconds, memory and rates of each stage, and the claim on time."""
    rows, total = [], 0.0
    for stage in TIMED_STAGES:
        speed = results.speed(stage)
        total += speed["seconds"]
        shown = [key for key in speed if not key.startswith(("seconds", "peak_memory_gib", *PRUNED_MODELS))]
        others = [f"{key} {number(speed[key])}" for key in shown]
        rows.append(
            (stage.replace("_", "-"), number(speed["seconds"]), number(speed["peak_memory_gib"]), ", ".join(others))
        )
    rows.append(("all", number(total), "", ""))
    return (
        "These figures differ from run to run and from machine to machine; all above do not.\n\n"
        + table(("Stage", "Seconds", "Peak memory (GiB)", "Other figures"), rows, "lrrl")
        + "\n\n"
        + _list_claims([judge(TIMED_CLAIM, results)])
        + "\n\n"
        + studies.describe_pruned_speed(results, figures)
    )
