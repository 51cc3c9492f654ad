"""A call and everything below it as a picture: the graph above, and below it what each call did in time.

Up to MOST_NODES calls are a node each. Beyond that, calls of one function whose parents are one node are one
node, with their number. In time each call is a row, in the order of the graph: thin where it waits or is
suspended, thick where it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

from slosched.analysis.call_runs import graph_of_run
from slosched.analysis.drawn import Drawn, columns_text, plain
from slosched.analysis.legends import look_of, short
from slosched.errors import InvalidConfig
from slosched.telemetry.call_graph import CallGraph, RecordedCall, facts_of
from slosched.units import NS_PER_MS, format_duration

#: Calls that are nodes of their own, and that have a row and arrows in time.
MOST_NODES = 80
MOST_ROWS = 600
#: Nodes with their names beside them.
_MOST_LABELS = 36
_FAILED = "#B00020"
_ROW_IN, _LEAST_IN, _MOST_IN = 0.09, 1.8, 9.0
_GRAPH_IN, _WIDTH_IN = 3.4, 9.0


@dataclass
class Node:
    """Calls that are drawn as one: of one function, with one node above. `x` is set by `_place`."""

    function: str
    depth: int
    calls: list[RecordedCall] = field(default_factory=list)
    below: list[Node] = field(default_factory=list)
    x: float = 0.0

    @property
    def failed(self) -> int:
        return sum(call.code != 0 for call in self.calls)


def plot_calls(run_dir: Path, out: Path, *, call_id: int | None = None) -> Drawn:
    """Draw a call of the run with all below it into the directory `out`, as calls.png and .pdf.

    Without `call_id` that of a client with the most calls below it, the first of several. Raises InvalidConfig
    without calls or without that one, MalformedLog, MissingPackage.
    """
    graph = graph_of_run(run_dir)
    root = _root(graph, run_dir, call_id)
    calls = list(graph.below(root))
    top = nodes_of(graph, root)
    functions = list(dict.fromkeys(call.function for call in calls))
    colours = {name: look_of(place)[0] for place, name in enumerate(functions)}
    facts = facts_of(graph, root)
    files = _draw(top, calls, colours, out, _title(root, facts.calls, facts.critical_ns))
    rows = _functions(calls)
    numbers = {"call": root.call_id, **asdict(facts), "functions": rows}
    return Drawn(files, plain(numbers), _text(root, asdict(facts), rows))


def _root(graph: CallGraph, run_dir: Path, call_id: int | None) -> RecordedCall:
    if call_id is None:
        sizes = {root.call_id: sum(1 for _ in graph.below(root)) for root in graph.roots}
        return max(graph.roots, key=lambda root: (sizes[root.call_id], -root.call_id))
    found = graph.calls.get(call_id)
    if found is None:
        raise InvalidConfig(
            f"{run_dir} has no call {call_id}; they are numbered from {min(graph.calls)} to {max(graph.calls)}"
        )
    return found


def nodes_of(graph: CallGraph, root: RecordedCall, *, most: int = MOST_NODES) -> Node:
    """The nodes from `root` on: one for each call if there are at most `most` of them, else grouped."""
    calls = list(graph.below(root))
    single = len(calls) <= most
    node_of: dict[int, Node] = {}
    groups: dict[tuple[int, str], Node] = {}
    for call in calls:
        parent = node_of.get(call.parent_id) if call is not root else None
        node = groups.get((id(parent), call.function)) if not single else None
        if node is None:
            node = Node(call.function, 0 if parent is None else parent.depth + 1)
            if parent is not None:
                parent.below.append(node)
                groups[id(parent), call.function] = node
        node.calls.append(call)
        node_of[call.call_id] = node
    _place(node_of[root.call_id])
    return node_of[root.call_id]


def _place(top: Node) -> None:
    """Leaves from left to right, each other node above the middle of its own."""
    order = _all_nodes(top)
    next_x = 0.0
    for node in order:
        if not node.below:
            node.x, next_x = next_x, next_x + 1.0
    for node in reversed(order):
        if node.below:
            node.x = (node.below[0].x + node.below[-1].x) / 2


def _all_nodes(top: Node) -> list[Node]:
    """Each before those below it."""
    nodes, waiting = [], [top]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        waiting += node.below[::-1]
    return nodes


# --------------------------------------------------------------------------------- drawing


def _draw(
    top: Node, calls: Sequence[RecordedCall], colours: Mapping[str, str], out: Path, title: str
) -> list[Path]:
    from slosched.analysis import style

    rows = calls[:MOST_ROWS]
    time_in = min(_MOST_IN, max(_LEAST_IN, _ROW_IN * len(rows)))
    with style.look():
        figure = style.Figure(figsize=(_WIDTH_IN, _GRAPH_IN + time_in + 0.8), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(_GRAPH_IN, time_in))
        above.set_title(title)
        _draw_graph(above, top, colours)
        _draw_times(below, rows, colours)
        if len(rows) < len(calls):
            below.set_title(f"the first {len(rows)} of {len(calls)} calls", fontsize=9)
        _legend(figure, colours)
        return style.save(figure, out, "calls")


def _draw_graph(ax: Any, top: Node, colours: Mapping[str, str]) -> None:
    from slosched.analysis.style import INK, PALE

    nodes = _all_nodes(top)
    edges = [(node, child) for node in nodes for child in node.below]
    ax.plot(
        [at for node, child in edges for at in (node.x, child.x, None)],
        [at for node, child in edges for at in (-node.depth, -child.depth, None)],
        color=PALE,
        lw=0.9,
        zorder=1,
    )
    ax.scatter(
        [node.x for node in nodes],
        [-node.depth for node in nodes],
        s=90 if len(nodes) <= 40 else 34,
        color=[colours[node.function] for node in nodes],
        edgecolor=[_FAILED if node.failed else INK for node in nodes],
        linewidth=[1.6 if node.failed else 0.6 for node in nodes],
        zorder=2,
    )
    grouped = any(len(node.calls) > 1 for node in nodes)
    if len(nodes) <= (_MOST_LABELS if grouped else _MOST_LABELS // 3):
        for node in nodes:
            ax.annotate(
                _label(node),
                (node.x, -node.depth),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    ax.margins(x=0.12, y=0.15)
    ax.set_axis_off()


def _label(node: Node) -> str:
    many = f" x {len(node.calls):,}" if len(node.calls) > 1 else ""
    failed = f", {node.failed:,} failed" if node.failed else ""
    ran = format_duration(median_low(call.exec_ns for call in node.calls))
    return f"{short(node.function)}{many}\n{ran}{failed}"


def _draw_times(ax: Any, calls: Sequence[RecordedCall], colours: Mapping[str, str]) -> None:
    from slosched.analysis.style import PALE

    start_ns = calls[0].arrival_ns

    def ms(at_ns: int) -> float:
        return (at_ns - start_ns) / NS_PER_MS

    places = {call.call_id: place for place, call in enumerate(calls)}
    thick = max(0.8, min(6.0, 420 / len(calls)))
    waits = [(call, call.end_ns if call.start_ns is None else call.start_ns) for call in calls]
    _lines(ax, [(places[c.call_id], ms(c.arrival_ns), ms(at), PALE) for c, at in waits], thick / 4)
    begun = [(call, colours[call.function]) for call in calls if call.start_ns is not None]
    whole = [(places[c.call_id], ms(c.start_ns or 0), ms(c.end_ns), look) for c, look in begun]
    _lines(ax, whole, thick / 3)
    parts = [
        (places[call.call_id], ms(begin_ns), ms(end_ns), look)
        for call, look in begun
        for begin_ns, end_ns in _ran(call)
    ]
    _lines(ax, parts, thick)
    failed = [call for call in calls if call.code and call.start_ns is not None]
    ends = [ms(call.end_ns) for call in failed]
    rows = [places[call.call_id] for call in failed]
    ax.plot(ends, rows, "x", color=_FAILED, ms=min(6.0, thick + 2))
    if len(calls) <= MOST_NODES:
        _draw_arrows(ax, calls, places, ms)
    ax.set_ylim(len(calls) - 0.4, -0.6)
    ax.set_yticks([])
    ax.set_xlabel("ms after its arrival")
    ax.grid(axis="y", visible=False)


def _lines(ax: Any, lines: Sequence[tuple[int, float, float, str]], width: float) -> None:
    """Horizontal ones: row, begin, end, colour."""
    if lines:
        rows, begins, ends, looks = zip(*lines, strict=True)
        ax.hlines(rows, begins, ends, color=looks, lw=width)


def _ran(call: RecordedCall) -> list[tuple[int, int]]:
    """When the call ran; of one without parts it is known for how long."""
    if call.parts:
        return [(part.begin_ns, part.end_ns) for part in call.parts]
    begin_ns = call.start_ns or 0
    return [(begin_ns, begin_ns + call.exec_ns)]


def _draw_arrows(
    ax: Any, calls: Sequence[RecordedCall], places: Mapping[int, int], ms: Any
) -> None:
    """From where each parent asked for a child to its begin."""
    from slosched.analysis.style import PALE

    for call in calls:
        ran_ns = 0
        for part, asked in zip(call.parts, call.asked_in_parts(), strict=True):
            for child in asked:
                at_ns = min(part.begin_ns + max(0, child.asked_ns - ran_ns), part.end_ns)
                begin_ns = child.arrival_ns if child.start_ns is None else child.start_ns
                if child.call_id in places:
                    ax.annotate(
                        "",
                        (ms(begin_ns), places[child.call_id]),
                        (ms(at_ns), places[call.call_id]),
                        arrowprops={"arrowstyle": "->", "color": PALE, "lw": 0.6},
                    )
            ran_ns += part.ran_ns


def _legend(figure: Any, colours: Mapping[str, str]) -> None:
    from slosched.analysis.style import Line2D

    shown = list(colours.items())[: _MOST_LABELS // 3]
    lines = [Line2D([], [], color=colour, lw=4) for _, colour in shown]
    names = [short(name) for name, _ in shown]
    figure.legend(lines, names, loc="outside lower left", ncols=4)


# --------------------------------------------------------------------------------- numbers


def _title(root: RecordedCall, calls: int, critical_ns: int) -> str:
    return (
        f"{short(root.function)}: {calls:,} calls in {format_duration(root.latency_ns)}, "
        f"critical path {format_duration(critical_ns)}"
    )


def _functions(calls: Sequence[RecordedCall]) -> list[dict[str, Any]]:
    """For each function: how often it was called, and medians of the calls that began, in ns."""
    by_name: dict[str, list[RecordedCall]] = {}
    for call in calls:
        by_name.setdefault(call.function, []).append(call)
    return [_function(name, of_it) for name, of_it in by_name.items()]


def _function(name: str, calls: Sequence[RecordedCall]) -> dict[str, Any]:
    begun = [call for call in calls if call.start_ns is not None]
    waits = [max(0, (call.start_ns or 0) - call.arrival_ns) for call in begun]
    return {
        "function": name,
        "calls": len(calls),
        "failed": sum(call.code != 0 for call in calls),
        "cold": sum(call.cold for call in calls),
        "wait_ns": median_low(waits) if begun else None,
        "run_ns": median_low([call.exec_ns for call in begun]) if begun else None,
        "suspended_ns": median_low([call.suspended_ns for call in begun]) if begun else None,
        "out_bytes": sum(call.out_bytes for call in calls),
    }


def _text(root: RecordedCall, facts: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> str:
    headings = ("function", "calls", "failed", "cold", "waited", "ran", "suspended")
    cells = [
        (
            row["function"],
            row["calls"],
            row["failed"],
            row["cold"],
            *(
                "-" if row[key] is None else format_duration(row[key])
                for key in ("wait_ns", "run_ns", "suspended_ns")
            ),
        )
        for row in rows
    ]
    return (
        f"call {root.call_id}, {root.function}: {facts['calls']:,} calls, {facts['depth']} deep, in "
        f"{format_duration(facts['makespan_ns'])}; no number of slots makes it shorter than "
        f"{format_duration(facts['critical_ns'])}. Medians:\n{columns_text(headings, cells)}"
    )
