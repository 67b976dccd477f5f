"""Formatting of numbers, tables and literal text as Markdown, and Markdown as one self-contained HTML page."""

import base64
import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path

import markdown
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --page: #fff; --line: #d0d7de; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --page: #0d1117; --line: #30363d; --shade: #161b22; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-size: 14px; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; vertical-align: top; }
th { background: var(--shade); }
code { background: var(--shade); padding: .1rem .25rem; border-radius: 3px; font-size: 90%; overflow-wrap: anywhere; }
blockquote { margin: 1rem 0; padding: 0 1rem; border-left: 3px solid var(--line); overflow-wrap: anywhere; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
"""

# A number, with an interval or a count: 4.209 ± 0.035 (5), +3.83 [+2.94, +4.88], 2.592 (2.5 to 2.7), n/a, –.
_FIGURE = r"(n/a|to|of|[-+–±\d.,e \[\]()])*"


def number(value: float | Real) -> str:
    """Four significant digits with thousands separators, integers in full: 3.292, 50,257, 8.8e-04, n/a for NaN."""
    if isinstance(value, Integral):
        return f"{value:,}"
    value = float(value)
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= 1000 or value == 0:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if size >= 0.001 else f"{value:.1e}"


def write_spread(values: pd.Series, unit: str = "", sign: str = "") -> str:
    """Mean ± standard deviation (n), rounded to two digits of the deviation: 4.209 ± 0.035 (5); – for one value.

    With the sign "+" a positive mean has one too; the unit is written before the number of values.
    """
    mean, deviation, count = values.mean(), values.std(), values.count()
    if count < 2:
        return "–"
    if deviation == 0:
        return f"{mean:{sign},.6g} ± 0{unit} ({count})"
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:{sign},.{decimals}f} ± {deviation:,.{decimals}f}{unit} ({count})"


def table(frame: pd.DataFrame, headings: Mapping[str, str] | None = None) -> str:
    """A Markdown table of a frame, or of its columns in `headings` under these. Figures are right-aligned.

    Numbers go through `number`. Strings are Markdown; bars and line ends are escaped.
    """
    if headings is not None:
        frame = frame[list(headings)].rename(columns=headings)
    cells = frame.astype(object).map(_cell)
    align = ["right" if column.str.fullmatch(_FIGURE).all() else "left" for _, column in cells.items()]
    head, rule, *rows = cells.to_markdown(index=False, disable_numparse=True, colalign=align).splitlines()
    # Without padding, a changed cell changes one line of report.md.
    return re.sub(" +", " ", "\n".join([head, re.sub("-+", "--", rule), *rows]))


def _cell(value: object) -> str:
    text = number(value) if isinstance(value, Real) else str(value)
    return " ".join(text.split()).replace("|", "&#124;")


def literal(text: str) -> str:
    """Text on one line in which nothing is Markdown or HTML: every character but letters, digits and plain
    punctuation becomes a numeric entity."""
    return re.sub(r"[^\w\s.,;?'\"=/%()-]|_", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def load_template(name: str) -> Template:
    """A template of this folder, which can format numbers, tables and literal text; an undefined name is an error."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "table": table, "literal": literal}
    return environment.get_template(name)


def to_html(text: str, title: str, folder: Path) -> str:
    """A whole HTML page of Markdown `text`, with the images, whose paths are relative to `folder`, embedded."""
    body = markdown.markdown(text, extensions=["tables"], output_format="html")
    body = re.sub(r'src="([^"]+\.png)"', lambda found: f'src="{_data_uri(folder / found[1])}"', body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
