"""Signs and legends of figures that compare several things: a colour and a marker each, names below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def look_of(place: int) -> tuple[str, str]:
    """(colour, marker) of the thing at `place`; when the colours begin again, the markers are others."""
    from slosched.analysis.style import COLOURS, MARKERS

    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def size_with_legend(
    width_in: float, height_in: float, names: Sequence[str]
) -> tuple[float, float]:
    """A figure's size with room for the rows of its legend under axes of that height."""
    return width_in, height_in + 0.2 * math.ceil(len(names) / columns_of(width_in, names))


def columns_of(width_in: float, names: Sequence[str], most: int = 3) -> int:
    """How many columns of a legend with `names` a figure of that width has room for."""
    widest_in = 0.7 + 0.075 * max(map(len, names), default=0)
    return max(1, min(most, int(width_in // widest_in)))


def legend_below(figure: Any, ax: Any, names: Sequence[str]) -> None:
    """The legend under the axes, in the order of `names`, which are the labels in `ax`."""
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: names.index(labels[place]))
    figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside lower left",
        ncols=columns_of(figure.get_figwidth(), names),
    )


def short(name: str, longest: int = 30) -> str:
    """`name` with dots in its middle where it is longer than `longest` characters; both ends tell most."""
    if len(name) <= longest:
        return name
    head = (longest - 1 + 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def fitting(figure: Any, title: str) -> str:
    """`title` shortened to what fits `figure`: a wider one leaves no room for the axes."""
    return short(title, int(9 * figure.get_figwidth()))


def percent(share: float) -> str:
    """A share as a label of an axis: 12.5 %, 1,200 %."""
    value = 100 * share
    return f"{value:,.0f} %" if abs(value) >= 1000 else f"{value:.3g} %"


def short_all(names: Sequence[str], longest: int = 30) -> list[str]:
    """Each of `names` shortened; equal ones are told apart by a number."""
    made: list[str] = []
    for name in names:
        cut = short(name, longest)
        number = 2
        while cut in made:
            cut = f"{short(name, longest - 3)} {number}"
            number += 1
        made.append(cut)
    return made
