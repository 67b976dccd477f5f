"""Style, panels, axes and legends shared by the figures."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

# Okabe and Ito's and Tol's palettes, which are safe for colour-blind readers.
GREY, INK, RED, GREEN = "#8c8c8c", "#333333", "#cc79a7", "#009e73"
WIDTH = 8.0  # inches; 1,200 pixels
STYLE: dict[Any, Any] = {
    **{"figure.dpi": 150, "savefig.dpi": 150, "figure.constrained_layout.use": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK},
    **{"axes.labelsize": 9, "axes.titlesize": 9, "axes.titlecolor": INK, "axes.axisbelow": True},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e6e6e6", "grid.linewidth": 0.8},
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in {"color": GREY, "labelcolor": INK}.items()},
    **{"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False},
}


def make_panels(count: int, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """`count` panels in each of `rows`, row by row."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def colour_ramp(count: int, lightest: float = 0.15) -> np.ndarray:
    """Colours from light to dark; the lightest of the map are invisible on white."""
    return colormaps["cividis_r"](np.linspace(lightest, 1, count))


def scale_vocabulary(axes: Axes, sizes: Iterable[int]) -> None:
    """A logarithmic horizontal axis of vocabulary sizes, and the label of points of GPT-2's own."""
    axes.plot([], [], "o", color=INK, markerfacecolor="white", label="GPT-2's own vocabulary")
    axes.set(xscale="log", xlabel="Vocabulary size (tokens)")
    axes.set_xticks([*sizes], [f"{size / 1000:.3g}k" for size in sizes], rotation=45)
    axes.minorticks_off()


def scale_log(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")


def draw_level(axes: Axes, value: float, label: str = "", linestyle: str = "--", colour: str = INK) -> None:
    """A horizontal reference line."""
    axes.axhline(value, color=colour, linestyle=linestyle, linewidth=1, zorder=1, label=label)


def add_legend(figure: Figure, columns: int = 6) -> Figure:
    """Draw one legend above the panels, with each label once. Returns the figure."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)
    return figure
