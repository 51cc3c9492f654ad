"""`slosched plot calls`: a call with all below it as a graph, and in time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from made_call_run import MS, a_call, a_part, family, write_calls
from slosched.analysis.call_figure import Node, nodes_of, plot_calls
from slosched.analysis.call_runs import graph_of_run
from slosched.cli.app import app
from slosched.core.scheduler.interface import CallPart, CallRecord
from slosched.errors import InvalidConfig


def tree(width: int, depth: int) -> tuple[list[CallRecord], list[CallPart]]:
    """A call with `width` children, each with as many, `depth` levels of them; every 7th of the last fails."""
    calls: list[CallRecord] = []
    parts: list[CallPart] = []
    level = [(0, -1, -1)]
    number = 1
    for at in range(depth + 1):
        below = []
        for key, parent, child in level:
            last = at == depth
            calls.append(
                a_call(
                    key,
                    at,
                    200 - at,
                    function=f"level{at}",
                    parent=parent,
                    child=child,
                    asked_ran=1 if at else 0,
                    start=at + key / 10_000,
                    exec=1,
                    children=0 if last else width,
                    code=104 if last and key % 7 == 0 else 0,
                    worker_id=0,
                    gpu_id=0,
                )
            )
            parts.append(a_part(key, 0, at, at + 1, () if last else tuple(range(width))))
            if not last:
                below += [(number + n, key, n) for n in range(width)]
                number += width
        level = below
    return calls, parts


def outline(node: Node) -> tuple[str, int, list[object]]:
    return node.function, len(node.calls), [outline(below) for below in node.below]


def drawn_well(files: list[Path]) -> None:
    assert [path.name for path in files] == ["calls.png", "calls.pdf"]
    pixels = np.asarray(Image.open(files[0]).convert("RGB")).reshape(-1, 3)
    assert pixels.std() > 5, "an empty drawing"


def test_a_small_graph_has_a_node_for_each_call(tmp_path: Path) -> None:
    write_calls(tmp_path, *family())
    graph = graph_of_run(tmp_path)
    top = nodes_of(graph, graph.roots[0])
    assert outline(top) == ("parent", 1, [("leaf", 1, []), ("leaf", 1, []), ("last", 1, [])])
    assert [node.x for node in top.below] == [0, 1, 2] and top.x == 1
    assert [node.failed for node in top.below] == [0, 1, 0]


def test_a_large_graph_has_a_node_for_calls_that_are_alike(tmp_path: Path) -> None:
    write_calls(tmp_path, *tree(8, 3))
    graph = graph_of_run(tmp_path)
    top = nodes_of(graph, graph.roots[0])
    assert outline(top) == (
        "level0",
        1,
        [("level1", 8, [("level2", 64, [("level3", 512, [])])])],
    )


def test_a_graph_of_585_calls_is_drawn(tmp_path: Path) -> None:
    write_calls(tmp_path, *tree(8, 3))
    drawn = plot_calls(tmp_path, tmp_path / "out")
    drawn_well(drawn.files)
    assert drawn.numbers["calls"] == 585 and drawn.numbers["depth"] == 4
    assert drawn.numbers["critical_ns"] == 4 * MS
    assert {row["function"]: row["failed"] for row in drawn.numbers["functions"]}["level3"] > 0


def test_a_deep_chain_is_drawn(tmp_path: Path) -> None:
    write_calls(tmp_path, *tree(1, 1_200))
    drawn_well(plot_calls(tmp_path, tmp_path / "out").files)


def test_calls_that_never_began_are_drawn(tmp_path: Path) -> None:
    calls = [
        a_call(0, 0, 4, start=0, exec=4, children=1),
        a_call(1, 1, 3, parent=0, child=0, code=54),
    ]
    write_calls(tmp_path, calls)  # without any part
    drawn = plot_calls(tmp_path, tmp_path / "out")
    drawn_well(drawn.files)
    assert [row["wait_ns"] for row in drawn.numbers["functions"]] == [0]
    write_calls(tmp_path, [a_call(0, 0, 0, code=54)])
    drawn = plot_calls(tmp_path, tmp_path / "out2")
    assert drawn.numbers["functions"][0]["run_ns"] is None and "-" in drawn.text


def test_the_largest_call_is_drawn_unless_one_is_named(tmp_path: Path) -> None:
    calls, parts = family()
    write_calls(tmp_path, [*calls, a_call(9, 20, 21, function="alone")], parts)
    assert plot_calls(tmp_path, tmp_path / "out").numbers["call"] == 1
    assert plot_calls(tmp_path, tmp_path / "out", call_id=4).numbers["calls"] == 1
    with pytest.raises(InvalidConfig, match="no call 77; they are numbered from 1 to 9"):
        plot_calls(tmp_path, tmp_path / "out", call_id=77)


def test_the_command_draws_and_prints_its_numbers(tmp_path: Path) -> None:
    write_calls(tmp_path, *family())
    done = CliRunner().invoke(app, ["plot", "calls", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    drawn_well([Path(file) for file in document["files"]])
    assert document["critical_ns"] == 10 * MS
    again = CliRunner().invoke(app, ["plot", "calls", str(tmp_path), "--out", str(tmp_path / "o")])
    assert "no number of slots makes it shorter than 10ms" in again.output
    assert (tmp_path / "o" / "calls.png").read_bytes() == Path(document["files"][0]).read_bytes()


def test_a_directory_without_calls_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plot", "calls", str(tmp_path)])
    assert done.exit_code == 2 and "has no calls.tsv" in done.output
