"""A line below figures: every figure of a block has it, and nothing that was drawn is covered or moved."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from slosched.analysis import style
from slosched.analysis.legends import legend_below
from slosched.analysis.signature import line_below, signed


def drawn(path: Path) -> bytes:
    with style.look():
        figure = style.Figure(figsize=(4, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot([1, 2], label="one")
        legend_below(figure, axes, ["one"])
        style.save(figure, path.parent, path.name, forms=("png",))
    return path.with_suffix(".png").read_bytes()


def height(png: bytes) -> int:
    return int.from_bytes(png[20:24], "big")


def test_a_figure_in_the_block_has_the_line_below_it(tmp_path: Path) -> None:
    plain = drawn(tmp_path / "plain")
    with signed("it is not that"):
        one = drawn(tmp_path / "one")
        with signed("it is not that " * 20):
            several = drawn(tmp_path / "several")
        assert line_below() == "it is not that"
    assert height(plain) < height(one) < height(several)
    assert line_below() == "" and drawn(tmp_path / "again") == plain


def test_the_line_is_taken_back_behind_an_error() -> None:
    with pytest.raises(KeyError), signed("within"):
        raise KeyError
    assert line_below() == ""
