"""report: metrics and curves become report.md, report.html, their figures and the verdicts."""

from pathlib import Path

from gpt2.pipeline.files import write_json, write_text
from gpt2.pipeline.stage import Stage
from gpt2.report.claims import judge_claims
from gpt2.report.document import summarise_claims, write_report
from gpt2.report.figures import FIGURES, TIMED_FIGURES, write_figures
from gpt2.report.markdown import to_html
from gpt2.report.results import Results

ROOT = Path(".")
PICTURES = Path("plots/report")
TIMED_PICTURES = Path("plots/timed")
MARKDOWN = Path("report.md")
HTML = Path("report.html")
SUMMARY = Path("metrics/summary.json")


def main() -> None:
    with Stage("report") as stage:
        scale = stage.top("scale")
        results = Results(ROOT, norm=stage.top("norm"), scale=scale, settings=stage.top(scale))
        figures = write_figures(results, PICTURES, FIGURES) | write_figures(results, TIMED_PICTURES, TIMED_FIGURES)
        claims = judge_claims(results)
        text = write_report(results, claims, {name: path.as_posix() for name, path in figures.items()})
        write_json(SUMMARY, summarise_claims(claims))
        write_text(MARKDOWN, text)
        write_text(HTML, to_html(text, "GPT-2 report", ROOT))


if __name__ == "__main__":
    main()
