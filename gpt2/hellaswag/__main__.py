"""Compare two models on HellaSwag by McNemar's test on the same items.

    python -m gpt2.hellaswag A B

A and B are files written by the stage hellaswag, or revisions and experiments of this repository whose file DVC has:
`python -m gpt2.hellaswag HEAD workspace`.
"""

from pathlib import Path

import dvc.api
import pandas as pd
from dvc.exceptions import DvcException
from dvc.scm import SCMError

from gpt2.hellaswag.items import ACCURACIES
from gpt2.hellaswag.mcnemar import Comparison, count_items
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError

SCORES = Path("data/hellaswag_scores.csv")


def compare(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, Comparison]:
    """A comparison by each accuracy. Raises UserError if the scores are of other items."""
    if len(a) != len(b) or (a["label"] != b["label"]).any():
        raise UserError(f"A has {len(a)} items, B {len(b)}, or other labels; compare scores of the same benchmark")
    comparisons = {}
    for name in ACCURACIES:
        right_a, right_b = ((of[name] == of["label"]).to_numpy() for of in (a, b))
        comparisons[name] = count_items(right_a, right_b)
    return comparisons


def read_scores(source: str) -> pd.DataFrame:
    """Scores from a file or, where there is none of that name, a revision. Raises UserError if neither has any."""
    try:
        if Path(source).is_file():
            scores = pd.read_csv(source)
        elif source == "workspace":
            scores = pd.read_csv(SCORES)
        else:
            with dvc.api.open(str(SCORES), rev=source) as file:
                scores = pd.read_csv(file)
    except (OSError, ValueError, DvcException, SCMError) as error:
        raise UserError(
            f"{source} is neither a readable file of scores nor a revision that DVC has {SCORES} of ({error}); "
            "run `dvc repro hellaswag` there, or `dvc fetch`"
        ) from error
    if missing := [name for name in ("label", *ACCURACIES) if name not in scores]:
        raise UserError(f"{source} lacks the columns {', '.join(missing)}; name a file that the stage hellaswag wrote")
    return scores


def render_comparisons(comparisons: dict[str, Comparison]) -> str:
    """The comparisons as a table."""
    table = pd.DataFrame(
        {
            "both right": [c.both for c in comparisons.values()],
            "only A": [c.only_a for c in comparisons.values()],
            "only B": [c.only_b for c in comparisons.values()],
            "neither": [c.neither for c in comparisons.values()],
            "A %": [f"{100 * (c.both + c.only_a) / c.items:.2f}" for c in comparisons.values()],
            "B %": [f"{100 * (c.both + c.only_b) / c.items:.2f}" for c in comparisons.values()],
            "B - A": [_show_difference(c) for c in comparisons.values()],
            "p": [f"{c.p_value:.3g}" for c in comparisons.values()],
        },
        index=list(comparisons),
    )
    items = next(iter(comparisons.values())).items
    return (
        f"{items:,} items; B - A in points with its 95 % interval (Newcombe); p by McNemar's exact test\n\n"
        f"{table.to_string()}"
    )


def _show_difference(comparison: Comparison) -> str:
    difference, low, high = (100 * x for x in (comparison.difference[0], *comparison.interval))
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"


def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    parser = Parser(prog="python -m gpt2.hellaswag", description="Compare two models on HellaSwag.")
    parser.add_argument("sources", nargs="*", metavar="A B", help="two files of scores, or two revisions")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="an older spelling of A B")
    options = parser.parse_args(argv)
    sources = options.compare or options.sources
    if len(sources) != 2:
        parser.error("name two models to compare: files of scores, or revisions")
    a, b = sources
    with reporting("hellaswag"):
        print(render_comparisons(compare(read_scores(a), read_scores(b))))


if __name__ == "__main__":
    main()
