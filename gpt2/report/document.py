"""The report as Markdown: the template report.md.j2, filled with metrics, tables, figures and verdicts."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from gpt2.report import tables
from gpt2.report.claims import CLAIMS, TIMED_CLAIM, Row, judge
from gpt2.report.markdown import load_template, number, write_spread
from gpt2.report.names import PREDICTORS
from gpt2.report.results import Results
from gpt2.report.verdicts import VERDICTS

TIMED_STAGES = (
    *("prepare", "benchmark", "tokenize", "tokenizer_study", "norm_study"),
    *("train", "hellaswag", "generate", "head_similarity", "prune", "replicates"),
)


def judge_claims(results: Results) -> list[Row]:
    """Every claim with its verdict, except the one on measured time."""
    return [judge(claim, results) for claim in CLAIMS]


def summarise_claims(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of metrics/summary.json: the number of claims by verdict, and verdict_<key> of each claim."""
    counts = Counter(row.verdict for row in rows)
    figures = {f"claims_{verdict.replace(' ', '_')}": counts[verdict] for verdict in VERDICTS}
    return figures | {f"verdict_{row.claim.key}": row.verdict for row in rows}


def write_report(results: Results, rows: Sequence[Row], figures: Mapping[str, str]) -> str:
    """The report as Markdown; `figures` gives the link of each figure by name, `rows` are of judge_claims.

    All but the last section depends on metrics and curves alone, the last on measured times. Raises UserError naming
    file and key if a metric, column or file is missing.
    """
    value = results.value

    def interval(metric: str) -> str:
        return f"{value(metric):+.2f} [{value(f'{metric}_low'):+.2f}, {value(f'{metric}_high'):+.2f}]"

    def accuracy(metric: str) -> str:
        return f"{100 * value(metric):.2f} ± {100 * value(f'{metric}_stderr'):.2f}"

    def claims_of(study: str) -> pd.DataFrame:
        return tabulate_claims([row for row in rows if row.claim.study == study])

    return load_template("report.md.j2").render(
        **{"results": results, "figures": figures, "tables": tables, "value": value, "interval": interval},
        **{"accuracy": accuracy, "claims_of": claims_of, "claims": tabulate_claims(rows), "predictors": PREDICTORS},
        num=lambda metric: number(value(metric)),
        spread=lambda metric, unit=1: write_spread(unit * pd.Series(results.over_models(metric))),
        verdicts=[(verdict, count) for verdict in VERDICTS if (count := [row.verdict for row in rows].count(verdict))],
        timed_claim=tabulate_claims([judge(TIMED_CLAIM, results)]),
        timed_stages=TIMED_STAGES,
        python=platform.python_version(),
    )


def tabulate_claims(rows: Sequence[Row]) -> pd.DataFrame:
    """Claims with verdict, measured figures and rule."""
    cells = [(row.claim.sentence, f"**{row.verdict}**", row.measured, row.claim.rule) for row in rows]
    return pd.DataFrame(cells, columns=["Claim", "Verdict", "Measured", "Rule"])
