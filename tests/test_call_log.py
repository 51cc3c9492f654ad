"""calls.tsv and call_parts.tsv: what is written is what is read, and the graph of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from made_call_run import MS, START_NS, a_call, a_part, family, write_calls
from slosched.telemetry import call_log, call_part_log
from slosched.telemetry.call_graph import CallGraph, facts_of, read_call_graph
from slosched.telemetry.call_tally import MOST_FUNCTIONS, OTHERS, CallTally
from slosched.telemetry.log_lines import MalformedLog


def graph_in(directory: Path) -> CallGraph:
    return read_call_graph(directory / call_log.FILE_NAME, directory / call_part_log.FILE_NAME)


def test_a_row_says_what_the_record_says(tmp_path: Path) -> None:
    calls, parts = family()
    write_calls(tmp_path, calls, parts)
    log = call_log.read_call_log(tmp_path / call_log.FILE_NAME)
    assert log["call_id"].tolist() == [2, 3, 4, 1]
    assert log["parent_id"].tolist() == [1, 1, 1, -1]
    assert log["function"].tolist() == ["leaf", "leaf", "last", "parent"]
    assert log["latency"].tolist() == [round(ms * MS) for ms in (5.3, 6.9, 3.9, 15)]
    assert log["start"].tolist() == [round(ms * MS) for ms in (1.3, 4.4, 0.9, 0)]
    assert log["code"].tolist() == [0, 104, 0, 0]
    rows = call_part_log.read_call_part_log(tmp_path / call_part_log.FILE_NAME)
    assert rows["first"].tolist() == [0, -1, 2, -1, -1]
    assert rows["last"].tolist() == [1, -1, 2, -1, -1]
    assert rows["ran"].tolist() == [2 * MS, 4 * MS, MS, 3 * MS, MS]


def test_a_call_that_did_not_begin_has_no_start(tmp_path: Path) -> None:
    write_calls(tmp_path, [a_call(1, 0, 0, code=54)])
    log = call_log.read_call_log(tmp_path / call_log.FILE_NAME)
    assert log["start"].tolist() == [-1]
    assert read_call_graph(tmp_path / call_log.FILE_NAME, None).calls[1].start_ns is None


@pytest.mark.parametrize(
    ("near", "read"),
    [
        ("", ""),
        ("a key, with commas],[", "a key, with commas],["),
        ("two\tcells\n", "two?cells?"),
        ("Schlüssel", "Schlüssel"),
        ("\x1f\x00\u2028", "???"),
        ('"quoted"\\', '"quoted"\\'),
    ],
)
def test_a_key_of_a_user_never_breaks_the_row(tmp_path: Path, near: str, read: str) -> None:
    write_calls(tmp_path, [a_call(1, 0, 1, near=near), a_call(2, 0, 1, near="plain")])
    log = call_log.read_call_log(tmp_path / call_log.FILE_NAME)
    assert log["near"].tolist() == [read, "plain"]


def test_ranges_of_awaited_children_have_a_row_each(tmp_path: Path) -> None:
    write_calls(
        tmp_path, [a_call(1, 0, 9)], [a_part(1, 0, 0, 1, (5, 0, 1, 2, 7)), a_part(1, 1, 8, 9)]
    )
    (call,) = graph_in(tmp_path).roots
    assert [part.awaits for part in call.parts] == [[(0, 2), (5, 5), (7, 7)], []]
    assert list(call.parts[0].awaited()) == [0, 1, 2, 5, 7]


def test_the_graph_is_that_of_the_calls(tmp_path: Path) -> None:
    write_calls(tmp_path, *family())
    graph = graph_in(tmp_path)
    (root,) = graph.roots
    assert root.function == "parent"
    assert sorted(root.children) == [0, 1, 2]
    assert [call.call_id for call in graph.below(root)] == [1, 2, 3, 4]
    assert [[c.child for c in asked] for asked in root.asked_in_parts()] == [[0, 1], [2], []]
    last = root.last_awaited(root.parts[0])
    assert last is not None and last.call_id == 3
    assert root.parts[1].begin_ns == START_NS + 9 * MS


def test_the_critical_path_is_what_no_number_of_slots_shortens(tmp_path: Path) -> None:
    write_calls(tmp_path, *family())
    graph = graph_in(tmp_path)
    facts = facts_of(graph, graph.roots[0])
    # 1 until child 0 is asked for, its 4, then 1 until child 2, its 3, and the last 1.
    assert facts.critical_ns == 10 * MS
    assert facts.makespan_ns == 15 * MS
    assert (facts.calls, facts.depth, facts.failed) == (4, 2, 1)
    assert facts.ran_ns == round(13.5 * MS)


def test_children_asked_for_between_suspensions_without_a_run_between_come_in_order(
    tmp_path: Path,
) -> None:
    """Both children were asked for after 0 ns of the run; the second one after the first one's answer."""
    on = {"start": 0, "exec": 0}
    calls = [
        a_call(2, 0, 5, parent=1, child=0, start=0, exec=5),
        a_call(3, 5, 8, parent=1, child=1, start=5, exec=3),
        a_call(1, 0, 8, children=2, **on),
    ]
    parts = [a_part(1, 0, 0, 0, (0,)), a_part(1, 1, 5, 5, (1,)), a_part(1, 2, 8, 8)]
    write_calls(tmp_path, calls, parts)
    graph = graph_in(tmp_path)
    assert [[c.child for c in asked] for asked in graph.roots[0].asked_in_parts()] == [[0], [1], []]
    assert facts_of(graph, graph.roots[0]).critical_ns == 8 * MS


def test_a_deep_chain_needs_no_deep_stack(tmp_path: Path) -> None:
    depth = 5_000
    calls = [
        a_call(n, n, 2 * depth - n, parent=n - 1, child=0, start=n, exec=1, suspended=1)
        if n
        else a_call(0, 0, 2 * depth, start=0, exec=1)
        for n in range(depth)
    ]
    write_calls(tmp_path, calls, [])
    graph = graph_in(tmp_path)
    assert facts_of(graph, graph.roots[0]).depth == depth


def test_a_child_whose_parent_has_no_row_is_an_orphan(tmp_path: Path) -> None:
    calls, parts = family()
    write_calls(tmp_path, calls[:-1], parts)
    graph = graph_in(tmp_path)
    assert [(root.call_id, root.orphan) for root in graph.roots] == [
        (2, True),
        (3, True),
        (4, True),
    ]


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([a_call(1, 0, 1, parent=2, child=0), a_call(2, 0, 1)], "later 2 as its parent"),
        ([a_call(1, 0, 1), a_call(1, 0, 1)], "two rows are of call 1"),
    ],
)
def test_a_log_that_is_no_forest_is_refused(tmp_path: Path, calls: list, words: str) -> None:  # type: ignore[type-arg]
    write_calls(tmp_path, calls)
    with pytest.raises(MalformedLog, match=words):
        read_call_graph(tmp_path / call_log.FILE_NAME, None)


def test_a_part_that_awaits_too_much_is_refused(tmp_path: Path) -> None:
    write_calls(tmp_path, [a_call(1, 0, 1)], [])
    path = tmp_path / call_part_log.FILE_NAME
    path.write_text(f"{call_part_log.HEADER}\n{START_NS}\t1\t0\t5\t0\t{2**60}\n")
    with pytest.raises(MalformedLog, match="awaits"):
        graph_in(tmp_path)


def test_parts_after_a_lost_row_are_left_out(tmp_path: Path) -> None:
    calls, parts = family()
    write_calls(tmp_path, calls, [part for part in parts if (part.key, part.part) != (1, 1)])
    root = graph_in(tmp_path).roots[0]
    assert len(root.parts) == 1


def test_functions_are_counted(tmp_path: Path) -> None:
    tally = CallTally()
    for record in family()[0]:
        tally.add(record)
    report = tally.report()
    assert list(report) == ["last", "leaf", "parent"]
    assert report["leaf"]["codes"] == {"ok": 1, "call raised": 1}
    assert report["leaf"]["began"] == 2
    assert report["leaf"]["ran_ns"] == round(6.5 * MS)
    assert report["leaf"]["waited_ns"] == round(5.7 * MS)
    assert report["parent"]["children"] == 3
    assert report["parent"]["suspended_ns"] == 11 * MS


def test_names_that_peers_make_up_are_bounded() -> None:
    tally = CallTally()
    for number in range(MOST_FUNCTIONS + 50):
        tally.add(a_call(number, 0, 0, function=f"f{number}", code=6))
    assert len(tally.functions) == MOST_FUNCTIONS + 1
    assert tally.functions[OTHERS].calls == 50


def test_a_call_that_began_again_has_the_parts_and_children_of_its_last_try(tmp_path: Path) -> None:
    calls = [
        a_call(2, 1, 4, parent=1, child=0, code=1),
        a_call(3, 6, 8, parent=1, child=0, start=6, exec=2),
        a_call(1, 0, 10, start=5, exec=3, children=1, attempts=2),
    ]
    parts = [
        a_part(1, 0, 0, 2, (0,)),
        a_part(1, 0, 5, 6, (0,)),
        a_part(1, 1, 8, 10),
    ]
    write_calls(tmp_path, calls, parts)
    graph = graph_in(tmp_path)
    (root,) = graph.roots
    assert [part.begin_ns - START_NS for part in root.parts] == [5 * MS, 8 * MS]
    assert root.children[0].call_id == 3
    assert [call.call_id for call in graph.below(root)] == [1, 2, 3]
