"""A page for `dvc plots` that needs no network: DVC's own loads Vega from a CDN and stays blank offline.

python -m gpt2.report.plots_page writes the template and names it in .dvc/config.local; `make setup` calls it.
"""

import sys
from pathlib import Path

import vl_convert
from dvc.config import Config

from gpt2.pipeline.files import write_text

# Relative to .dvc, as DVC reads it.
TEMPLATE = Path("plots_page.html")
PAGE = """<!DOCTYPE html>
<html>
<head><meta charset="utf-8"><title>DVC Plot</title><script>{script}</script></head>
<body>{{plot_divs}}</body>
</html>
"""


def main() -> None:
    """Write the template beside DVC's configuration and point to it there."""
    # DVC fills the page by replacing {plot_divs}; vegaEmbed is what its divs call.
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    write_text(Path(".dvc") / TEMPLATE, PAGE.format(script=bundle.replace("</script", "<\\/script")))
    with Config(".dvc").edit("local") as config:
        config["plots"]["html_template"] = str(TEMPLATE)
    sys.stdout.write("dvc plots: page with Vega inside\n")


if __name__ == "__main__":
    main()
