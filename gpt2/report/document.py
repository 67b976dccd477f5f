"""The report as Markdown: the template report.md.j2, filled with metrics, tables, figures and verdicts."""

import platform
from collections.abc import Mapping
from typing import Any

import pandas as pd

from gpt2.report import tables
from gpt2.report.claims import judge_claims
from gpt2.report.markdown import load_template, number, write_spread
from gpt2.report.names import PREDICTORS
from gpt2.report.results import Results
from gpt2.report.verdicts import VERDICTS

TIMED_STAGES = (
    *("prepare", "benchmark", "tokenize", "tokenizer_study", "norm_study"),
    *("train", "hellaswag", "generate", "head_similarity", "prune", "replicates"),
)


def summarise_claims(claims: pd.DataFrame) -> dict[str, Any]:
    """Figures of metrics/summary.json: the number of claims by verdict, and verdict_<key> of each claim."""
    counts = {f"claims_{verdict.replace(' ', '_')}": int((claims["verdict"] == verdict).sum()) for verdict in VERDICTS}
    return counts | {f"verdict_{key}": verdict for key, verdict in claims["verdict"].items()}


def write_report(results: Results, claims: pd.DataFrame, figures: Mapping[str, str]) -> str:
    """The report as Markdown; `figures` gives the link of each figure by name, `claims` are of judge_claims.

    All but the last section depends on metrics and curves alone, the last on measured times. Raises UserError naming
    file and key if a metric, column or file is missing.
    """
    value = results.value

    def interval(metric: str) -> str:
        return f"{value(metric):+.2f} [{value(f'{metric}_low'):+.2f}, {value(f'{metric}_high'):+.2f}]"

    def accuracy(metric: str) -> str:
        return f"{100 * value(metric):.2f} ± {100 * value(f'{metric}_stderr'):.2f}"

    return load_template("report.md.j2").render(
        **{"results": results, "figures": figures, "claims": claims, "tables": tables, "value": value},
        num=lambda metric: number(value(metric)),
        interval=interval,
        accuracy=accuracy,
        spread=lambda metric, unit=1: write_spread(unit * pd.Series(results.over_models(metric))),
        verdicts=claims["verdict"].value_counts().reindex(VERDICTS).dropna().astype(int).to_dict(),
        timed_claims=judge_claims(results, timed=True),
        timed_stages=TIMED_STAGES,
        predictors=PREDICTORS,
        python=platform.python_version(),
    )
