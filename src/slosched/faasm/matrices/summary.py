"""Tables and figures of the experiment, from its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from slosched.errors import MissingPackage
from slosched.faasm.frame import Frame
from slosched.faasm.matrices import blocks
from slosched.faasm.matrices.systems import System
from slosched.units import NS_PER_MS

Record = dict[str, Any]
Points = list[tuple[int, list[float]]]
#: The paper has 2 splits: 64 multiplications and 9 merges.
PAPER_SPLITS = 2
#: A @ B in one process.
SINGLE = ("whole", "whole-one-core")
#: One process wins, or does not, where the medians differ by more than this part.
_EVEN = 0.05


def show(frame: Frame, systems: Sequence[System]) -> None:
    """Write all tables and figures of a run."""
    products = [each for each in frame.records() if each.get("kind") == "product"]
    cells = _cells(products, systems)
    measured = {each["system"] for each in frame.records()}
    there = [{"system": s.name, "is": s.about} for s in systems if s.name in measured]
    frame.table("matrices-systems", there)
    frame.table("matrices-duration", durations(cells), note=_DURATION_NOTE)
    frame.table("matrices-bytes", moved(cells), note=_BYTES_NOTE)
    frame.table("matrices-overhead", overheads(cells), note=_OVERHEAD_NOTE)
    frame.table("matrices-errors", errors(products), note=_ERROR_NOTE)
    frame.table("matrices-memory", memory(cells), note=_MEMORY_NOTE)
    frame.table("matrices-claims", claims(cells), note=_CLAIMS_NOTE)
    left_out = [each for each in frame.records() if each.get("kind") == "left out"]
    if left_out:
        columns = ("system", "size", "splits", "why")
        frame.table(
            "matrices-left-out", [{name: row[name] for name in columns} for row in left_out]
        )
    draw(frame, cells, systems)


_DURATION_NOTE = (
    "From the call to the value, without polling; the matrices are made before. times: of the duration of "
    "A @ B in one process, with one core or all, whichever was faster. On one machine a graph has no more "
    "cores than one process: it is there for what calls and state cost, and not for speed."
)
_BYTES_NOTE = (
    "MB of block values. read and written: by the calls; all of it would move if nothing were shared. "
    "pulled and pushed: from and to the global tier. Calls of one host that share its local tier move "
    "nothing. near and anywhere have EMULATED hosts on this machine: what moves is counted, and no "
    "network is in the durations. Deeper calls go first, so that with 3 splits all hosts work below one "
    "product of half the size at a time, which has one place: near moves less there than anywhere, and is "
    "not faster."
)
_OVERHEAD_NOTE = (
    "busy: the time of all bodies without waits; path: the longest chain of calls that need one another; "
    "beside: the duration less the shortest possible one, max(path, busy / slots), for each call; "
    "efficiency: that shortest one by the duration."
)
_ERROR_NOTE = (
    "The largest difference of any element from the product in float64, relative to the largest element; "
    "right: not above 8 sqrt(n) 2^-24. Every product of the engines is compared, and the last of each "
    "single process."
)
_MEMORY_NOTE = (
    "PSS of all processes below this one, sampled; GB-s is its integral over all products of a "
    "configuration, with what lies between them."
)


_CLAIMS_NOTE = (
    "The paper's figures are as they are remembered: its text was not at hand when this was written. Its "
    "system had wasm and 20 hosts, and no BLAS."
)


class Products:
    """The repeats of one configuration."""

    def __init__(self, system: System, size: int, splits: int, records: list[Record]) -> None:
        self.system, self.size, self.splits, self.records = system, size, splits, records

    @property
    def took_ns(self) -> float:
        return float(median(each["took_ns"] for each in self.records))

    def middle(self, name: str) -> float:
        """The median of a field that the calls of a graph report; 0 without calls."""
        return float(median(each.get(name, 0) for each in self.records))

    @property
    def moved_bytes(self) -> float:
        return self.middle("pulled_bytes") + self.middle("pushed_bytes")


Cells = dict[tuple[str, int, int], Products]


def _cells(products: Sequence[Record], systems: Sequence[System]) -> Cells:
    """The configurations that were measured: by size and splits, then in the order of the systems."""
    by_key: dict[tuple[str, int, int], list[Record]] = {}
    for each in products:
        by_key.setdefault((each["system"], each["size"], each["splits"]), []).append(each)
    order = {each.name: place for place, each in enumerate(systems)}
    known = {each.name: each for each in systems}
    keys = sorted(
        (key for key in by_key if key[0] in known),
        key=lambda key: (key[1], key[2], order[key[0]]),
    )
    return {key: Products(known[key[0]], key[1], key[2], by_key[key]) for key in keys}


def durations(cells: Cells) -> list[Record]:
    """How long each configuration took, and whether one process was faster."""
    rows = []
    for cell in cells.values():
        times = [each["took_ns"] / NS_PER_MS for each in cell.records]
        whole = fastest_single(cells, cell.size)
        ratio = None if whole is None else cell.took_ns / whole.took_ns
        rows.append(
            {
                "size": cell.size,
                "splits": cell.splits,
                "system": cell.system.name,
                "calls": blocks.calls(cell.splits) if cell.system.calls else 0,
                "ms": median(times),
                "least ms": min(times),
                "most ms": max(times),
                "gflop/s": blocks.operations(cell.size) / cell.took_ns,
                "times": ratio,
                "faster": verdict(cell, ratio),
            }
        )
    return rows


def fastest_single(cells: Cells, size: int) -> Products | None:
    """A @ B in one process, with one core or all: small matrices are faster with one."""
    found = [cells[key] for name in SINGLE if (key := (name, size, 0)) in cells]
    return min(found, key=lambda cell: cell.took_ns, default=None)


def verdict(cell: Products, ratio: float | None) -> str:
    """Who wins: one process, the system, or neither clearly."""
    if ratio is None or cell.system.name in SINGLE:
        return ""
    if ratio > 1 + _EVEN:
        return "one process"
    return cell.system.name if ratio < 1 - _EVEN else "neither"


def moved(cells: Cells) -> list[Record]:
    """What the calls of each configuration moved."""
    rows = []
    for cell in cells.values():
        if not cell.system.calls:
            continue
        travelling = cell.middle("read_bytes") + cell.middle("written_bytes")
        reads = cell.middle("reads")
        rows.append(
            {
                "size": cell.size,
                "splits": cell.splits,
                "system": cell.system.name,
                "read": cell.middle("read_bytes") / 1e6,
                "written": cell.middle("written_bytes") / 1e6,
                "pulled": cell.middle("pulled_bytes") / 1e6,
                "pushed": cell.middle("pushed_bytes") / 1e6,
                "moved": cell.moved_bytes / 1e6,
                "of all": cell.moved_bytes / travelling if travelling else 0.0,
                "found here": cell.middle("found_here") / reads if reads else 0.0,
            }
        )
    return rows


def overheads(cells: Cells) -> list[Record]:
    """What the calls cost beside their work."""
    rows = []
    for cell in cells.values():
        if not cell.system.calls:
            continue
        slots = cell.system.slots * cell.system.hosts
        busy, path, calls = cell.middle("busy_ns"), cell.middle("path_ns"), cell.middle("calls")
        rows.append(
            {
                "size": cell.size,
                "splits": cell.splits,
                "system": cell.system.name,
                "calls": int(calls),
                "ms": cell.took_ns / NS_PER_MS,
                "busy ms": busy / NS_PER_MS,
                "multiply ms": cell.middle("multiply_ns") / NS_PER_MS,
                "state ms": cell.middle("state_ns") / NS_PER_MS,
                "device copies ms": cell.middle("device_copy_ns") / NS_PER_MS,
                "path ms": path / NS_PER_MS,
                "beside ms": (cell.took_ns - max(path, busy / slots)) / calls / NS_PER_MS,
                "efficiency": max(path, busy / slots) / cell.took_ns,
            }
        )
    return rows


def errors(products: Sequence[Record]) -> list[Record]:
    """The largest error at each size and split, over all systems and repeats."""
    worst: dict[tuple[int, int], Record] = {}
    number: dict[tuple[int, int], int] = {}
    for each in products:
        place = each["size"], each["splits"]
        number[place] = number.get(place, 0) + 1
        if place not in worst or each["error"] > worst[place]["error"]:
            worst[place] = each
    return [
        {
            "size": size,
            "splits": splits,
            "products": number[size, splits],
            "largest error": row["error"],
            "of": row["system"],
            "tolerance": row["tolerance"],
            "right": row["right"],
        }
        for (size, splits), row in sorted(worst.items())
    ]


def memory(cells: Cells) -> list[Record]:
    """What the processes of each configuration held."""
    rows = []
    for cell in cells.values():
        bill = cell.records[0]
        rows.append(
            {
                "size": cell.size,
                "splits": cell.splits,
                "system": cell.system.name,
                "products": len(cell.records),
                "processes": bill["processes"],
                "peak PSS MB": bill["peak_pss_mb"],
                "largest process MB": bill["largest_pss_mb"],
                "CPU s": bill["cpu_s"],
                "GB-s": bill["gb_s_integral"],
                **(
                    {"GPU MB": bill["gpu_peak_mb"], "GPU GB-s": bill["gpu_gb_s_integral"]}
                    if "gpu_peak_mb" in bill
                    else {}
                ),
            }
        )
    return rows


def claims(cells: Cells) -> list[Record]:
    """What the paper says of this experiment, beside what was found at the largest size, and why it differs."""
    sizes = [size for _, size, splits in cells if splits == PAPER_SPLITS]
    if not sizes:
        return []
    size = max(sizes)

    def cell(name: str, splits: int = PAPER_SPLITS) -> Products | None:
        return cells.get((name, size, splits))

    slots, instances, near = cell("slots"), cell("instances"), cell("near")
    anywhere, whole = cell("anywhere"), fastest_single(cells, size)
    rows = []
    if slots and instances:
        rows.append(
            {
                "the paper": "Faasm and containers take about as long",
                "here": f"{_ms(slots)} shared, {_ms(instances)} with nothing shared, at {size}",
                "because": "without a shared tier blocks come through Redis on this host, which costs copies "
                "and no network; there is no wasm, and both have BLAS",
            }
        )
        rows.append(
            {
                "the paper": "about 13 % less network through sharing",
                "here": f"{_mb(slots)} shared, {_mb(instances)} with nothing shared",
                "because": "all slots are on one host here, which is the best case of a shared tier",
            }
        )
    if near and anywhere:
        rows.append(
            {
                "the paper": "blocks stay on the host that made them",
                "here": f"{_mb(near)} near, {_mb(anywhere)} anywhere; of these pulled "
                f"{_mb(near, 'pulled_bytes')} and {_mb(anywhere, 'pulled_bytes')}",
                "because": "each block is pushed once in both; near saves pulls alone",
            }
        )
    if slots and whole:
        rows.append(
            {
                "the paper": "does not say how one process does",
                "here": f"{_ms(whole)} by A @ B, {_ms(slots)} as a graph",
                "because": "a graph moves 84 n^2 bytes and starts 73 calls for the same 2 n^3 operations",
            }
        )
    return rows


def _ms(cell: Products) -> str:
    return f"{cell.took_ns / NS_PER_MS:.4g} ms"


def _mb(cell: Products, name: str = "") -> str:
    return f"{(cell.middle(name) if name else cell.moved_bytes) / 1e6:.3g} MB"


def draw(frame: Frame, cells: Cells, systems: Sequence[System]) -> None:
    """The figures, where matplotlib is."""
    splits = sorted({splits for (name, _, splits) in cells if name not in SINGLE})
    if not splits:
        return
    shown = PAPER_SPLITS if PAPER_SPLITS in splits else splits[-1]
    try:
        from slosched.analysis import faasm_matrices
    except MissingPackage as error:
        frame.say(f"no figures: {error}")
        return
    order = [each.title for each in systems]
    took: dict[str, Points] = {}
    by_splits: dict[str, Points] = {}
    moving: dict[str, list[faasm_matrices.Moved]] = {}
    shared = []
    largest = max(size for _, size, _ in cells)
    for cell in cells.values():
        title, single = cell.system.title, cell.system.name in SINGLE
        times = [each["took_ns"] / NS_PER_MS for each in cell.records]
        if cell.size == largest:
            at = splits if single else [cell.splits]
            by_splits.setdefault(title, []).extend((each, times) for each in at)
        if cell.splits != (0 if single else shown):
            continue
        took.setdefault(title, []).append((cell.size, times))
        if cell.moved_bytes:
            pulled = cell.middle("pulled_bytes") / cell.middle("read_bytes")
            point = faasm_matrices.Moved(cell.size, cell.moved_bytes / 1e6, pulled)
            moving.setdefault(title, []).append(point)
        elif cell.system.calls and title not in shared:
            shared.append(title)
    sizes = sorted({cell.size for cell in cells.values()})
    most = [(size, blocks.travelling_bytes(size, shown) / 1e6) for size in sizes]
    emulated = [each.title for each in systems if each.pushes and each.title in by_splits]
    note = f"EMULATED on this host: {'; '.join(emulated)}" if emulated else ""
    faasm_matrices.draw_durations(
        took, frame.figure("matrices-duration"), calls=blocks.calls(shown), order=order, note=note
    )
    if moving:
        faasm_matrices.draw_bytes(
            moving, frame.figure("matrices-bytes"), most=most, none=shared, order=order, note=note
        )
    if len(splits) > 1:
        faasm_matrices.draw_splits(
            by_splits, frame.figure("matrices-splits"), size=largest, order=order, note=note
        )
