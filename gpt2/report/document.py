"""The report as Markdown: the template report.md.j2, filled with metrics, tables, figures and verdicts."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gpt2.report import sections
from gpt2.report.claims import CLAIMS, TIMED_CLAIM, Row, judge
from gpt2.report.frames import load_models, load_vocabularies, write_spread
from gpt2.report.markdown import literal, number, table
from gpt2.report.names import PREDICTORS
from gpt2.report.results import Results
from gpt2.report.verdicts import VERDICTS

TIMED_STAGES = (
    *("prepare", "benchmark", "tokenize", "tokenizer_study", "norm_study"),
    *("train", "hellaswag", "generate", "head_similarity", "prune", "replicates"),
)


def judge_claims(results: Results) -> list[Row]:
    """Every claim with its verdict, but for the one on measured time."""
    return [judge(claim, results) for claim in CLAIMS]


def summarise_claims(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of metrics/summary.json: the number of claims by verdict, and verdict_<key> of each claim."""
    counts = {f"claims_{verdict.replace(' ', '_')}": 0 for verdict in VERDICTS}
    counts |= {f"claims_{verdict.replace(' ', '_')}": count for verdict, count in count_verdicts(rows).items()}
    return counts | {f"verdict_{row.claim.key}": row.verdict for row in rows}


def write_report(results: Results, rows: Sequence[Row], figures: Mapping[str, str]) -> str:
    """The report as Markdown; `figures` gives the link of each figure by name, `rows` are of judge_claims.

    All but the last section depends on metrics and curves alone, the last on measured times. Raises UserError naming
    file and key if a metric, column or file is missing.
    """
    models = load_models(results)

    def interval(metric: str) -> str:
        value, low, high = (results.value(f"{metric}{end}") for end in ("", "_low", "_high"))
        return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"

    def accuracy(metric: str) -> str:
        return f"{100 * results.value(metric):.2f} ± {100 * results.value(f'{metric}_stderr'):.2f}"

    def spread(metric: str, unit: int = 1) -> str:
        return write_spread(unit * pd.Series(results.over_models(metric)))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "table": table, "literal": literal}
    environment.globals |= {"value": results.value, "num": lambda metric: number(results.value(metric))}
    environment.globals |= {"interval": interval, "accuracy": accuracy, "spread": spread}
    return environment.get_template("report.md.j2").render(
        **{"results": results, "figures": figures, "sections": sections, "models": models},
        timed_stages=TIMED_STAGES,
        python=platform.python_version(),
        predictors=PREDICTORS,
        vocabularies=load_vocabularies(results),
        verdicts=count_verdicts(rows),
        claims=tabulate_claims(rows),
        claims_of=lambda study: tabulate_claims([row for row in rows if row.claim.study == study]),
        timed_claim=tabulate_claims([judge(TIMED_CLAIM, results)]),
        samples=results.texts("generate/samples.csv", ["prompt", "text"]).to_dict("records"),
    )


def count_verdicts(rows: Sequence[Row]) -> dict[str, int]:
    """Number of claims with each verdict that occurs, in the order of VERDICTS."""
    counts = Counter(row.verdict for row in rows)
    return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}


def tabulate_claims(rows: Sequence[Row]) -> pd.DataFrame:
    """Claims with verdict, measured figures and rule."""
    cells = [(row.claim.sentence, f"**{row.verdict}**", row.measured, row.claim.rule) for row in rows]
    return pd.DataFrame(cells, columns=["Claim", "Verdict", "Measured", "Rule"])
