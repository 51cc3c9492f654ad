"""How figures look, and the only module that imports matplotlib.

Importing it without matplotlib raises MissingPackage. Figures are made without pyplot: no global
state, no display, the same bytes each time.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slosched.analysis.signature import line_below
from slosched.errors import MissingPackage
from slosched.output_files import check_not_stdout, write_file

try:
    import matplotlib
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.lines
    import matplotlib.patches
    import matplotlib.ticker
except ImportError as error:
    raise MissingPackage(
        "figures need matplotlib, which is not installed: pip install 'slosched[plot]'"
    ) from error

# matplotlib has types in some versions and none in others; here it has none.
Figure: Any = matplotlib.figure.Figure
Line2D: Any = matplotlib.lines.Line2D
Rectangle: Any = matplotlib.patches.Rectangle
FixedLocator: Any = matplotlib.ticker.FixedLocator
FuncFormatter: Any = matplotlib.ticker.FuncFormatter
LogLocator: Any = matplotlib.ticker.LogLocator
NullLocator: Any = matplotlib.ticker.NullLocator
WholeLocator: Any = matplotlib.ticker.MaxNLocator
_rc_context: Any = matplotlib.rc_context

#: Okabe and Ito's palette, which the colour-blind can tell apart; its yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: A second sign beside the colour, for print in grey.
MARKERS = ("o", "s", "^", "D", "v", ">", "X")

INK = "#222222"
PALE = "#8a8a8a"
#: The line below a figure: its size in points, its letters in an inch, and the room above it.
_SMALL, _LETTERS_PER_IN, _GAP_IN = 6.5, 20, 0.04

_LOOK: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "lines.markersize": 5.5,
    "savefig.dpi": 180,
    "pdf.fonttype": 42,  # text stays text in the PDF
}


@contextmanager
def look(**changes: Any) -> Iterator[None]:
    """Draw and save within this: the project's look, with `changes` (rcParams; "_" for ".")."""
    settings = _LOOK | {key.replace("_", "."): value for key, value in changes.items()}
    with _rc_context(settings):
        yield


def save(
    figure: Any, out: Path, stem: str, *, forms: Sequence[str] = ("png", "pdf"), **more: Any
) -> list[Path]:
    """Write `figure` into the directory `out` as each of `forms` (png, pdf, jpg); return the paths.

    `more` goes to matplotlib's savefig. Raises InvalidConfig if the directory cannot be made or written.
    """
    check_not_stdout(out)
    if line := line_below():
        _sign(figure, line)
        more = {"bbox_inches": "tight", "pad_inches": 0.08, **more}
    documents: dict[str, dict[str, str | None] | None] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": "slosched"},
        "jpg": None,
    }
    paths = []
    for form in forms:
        drawn = io.BytesIO()
        figure.savefig(drawn, format=form, metadata=documents[form], **more)
        paths.append(out / f"{stem}.{form}")
        write_file(paths[-1], drawn.getvalue())
    return paths


def _sign(figure: Any, line: str) -> None:
    """Write a small line below the figure, which grows by it; broken where it is wider than the figure."""
    width_in, height_in = figure.get_size_inches()
    text = "\n".join(textwrap.wrap(line, max(40, int(width_in * _LETTERS_PER_IN))))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is there stays in its place
    for legend in figure.legends:  # else one would lie at the edge of what is saved
        legend.set_bbox_to_anchor((0, 0, 1, 1), transform=figure.transFigure)
    figure.text(0.01, -_GAP_IN / height_in, text, fontsize=_SMALL, color=INK, va="top")


def svg_of(figure: Any) -> str:
    """Return `figure` as an SVG document whose text stays text. To be called within `look()`."""
    drawn = io.StringIO()
    with _rc_context({"svg.fonttype": "none", "svg.hashsalt": "slosched"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def write_out(axis: Any, written: Callable[[float], str] = "{:,.10g}".format) -> None:
    """Number a logarithmic axis as 0.1, 10, 1,000, and over less than two powers of ten as 20 and 50 too."""

    def between(value: float, _: int) -> str:
        low, high = axis.get_view_interval()
        return written(value) if high < 100 * low and f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(FuncFormatter(between))


def shade(place: int, places: int) -> str:
    """The colour of `place` among `places` that have an order (SLOs, rates): from pale to deep."""
    share = 0.15 + 0.75 * (place / (places - 1) if places > 1 else 0.6)
    return str(matplotlib.colors.to_hex(matplotlib.colormaps["viridis_r"](share)))
