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
    right_a, right_b = (scores[[*ACCURACIES]].eq(scores["label"], axis=0) for scores in (a, b))
    return {name: count_items(right_a[name].to_numpy(), right_b[name].to_numpy()) for name in ACCURACIES}


def read_scores(source: str) -> pd.DataFrame:
    """Scores from the file `source` or, if it does not exist, from that revision. Raises UserError without any."""
    file = SCORES if source == "workspace" else Path(source)
    try:
        if file.is_file():
            scores = pd.read_csv(file)
        else:
            with dvc.api.open(str(SCORES), rev=source) as content:
                scores = pd.read_csv(content)
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
    rows = {}
    for name, found in comparisons.items():
        both, only_a, only_b, neither = found
        difference, low, high = (100 * x for x in (found.difference[0], *found.interval))
        rows[name] = {
            **{"both right": both, "only A": only_a, "only B": only_b, "neither": neither},
            "A %": f"{100 * (both + only_a) / found.items:.2f}",
            "B %": f"{100 * (both + only_b) / found.items:.2f}",
            "B - A": f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]",
            "p": f"{found.p_value:.3g}",
        }
    return (
        f"{found.items:,} items; B - A in points with its 95 % interval (Newcombe); p by McNemar's exact test\n\n"
        f"{pd.DataFrame.from_dict(rows, orient='index').to_string()}"
    )


def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    parser = Parser(prog="python -m gpt2.hellaswag", description="Compare two models on HellaSwag.")
    parser.add_argument("--compare", action="store_true", help="may precede A B, as in older versions")
    parser.add_argument("a", metavar="A", help="file of scores, or revision")
    parser.add_argument("b", metavar="B", help="another one")
    options = parser.parse_args(argv)
    with reporting("hellaswag"):
        print(render_comparisons(compare(read_scores(options.a), read_scores(options.b))))


if __name__ == "__main__":
    main()
