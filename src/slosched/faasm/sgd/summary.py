"""Tables and figures of a run of sgd, from its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from slosched.errors import MissingPackage
from slosched.faasm.frame import Frame
from slosched.faasm.sgd.training import MODES

Record = dict[str, Any]
_EMULATED = (
    "EMULATED: every instance of copies and sum-delta is a process of this host that behaves as if it "
    "stood on another one; no container and no network is measured."
)
#: What stands below every table: what is replaced, and what is emulated.
NOTE = (
    "shared: " + MODES["shared"].about + ". copies: " + MODES["copies"].about + ". "
    "sum-delta: " + MODES["sum-delta"].about + ". " + _EMULATED
)
_DATA = (
    "Synthetic examples in the shape of RCV1-v2 unless a file was given: losses and accuracies are not "
    "those of Reuters."
)


def show(frame: Frame) -> None:
    """Print and write all tables, and the figures where matplotlib is."""
    records = frame.records()
    timed = [each for each in records if "losses" in each and not each.get("counting")]
    sizes = list(dict.fromkeys(each["size"] for each in records))
    frame.table("sgd-data", list(data_rows(records)), note=_DATA)
    frame.table("sgd-time", list(time_rows(timed)), note=f"{TIME_NOTE} {NOTE}")
    frame.table("sgd-bytes", list(bytes_rows(timed)), note=f"{BYTES_NOTE} {NOTE}")
    frame.table("sgd-memory", list(memory_rows(timed)), note=f"{MEMORY_NOTE} {NOTE}")
    frame.table("sgd-lost", list(lost_rows(records)), note=f"{LOST_NOTE} {NOTE}")
    frame.table("sgd-check", list(check_rows(records)), note=CHECK_NOTE)
    if without := [each for each in records if each.get("why")]:
        rows = [{"key": each["key"], "why": each["why"]} for each in without]
        frame.table("sgd-left-out", rows)
    frame.table("sgd-claims", list(claim_rows(timed, sizes)), note=CLAIM_NOTE)
    try:
        from slosched.analysis.faasm_sgd import draw
    except MissingPackage as error:
        frame.say(f"no figures: {error}")
        return
    for size in sizes:
        ours = [each for each in timed if each["size"] == size]
        if any(each["system"] in MODES for each in ours):
            origin = next((each["data"]["origin"] for each in ours if each.get("data")), "")
            title = f"sgd, {size} ({origin})" if origin else f"sgd, {size}"
            draw(ours, title, frame.figure(f"sgd-{size}"), note=_EMULATED)


TIME_NOTE = (
    "With one worker shared and copies do the same work: what their times differ by is the machine. "
    "Medians over seeds, ranges from the fastest to the slowest. faster than 1, faster than 2: the time "
    "of the same mode with 1 or 2 workers by this one. loss is the root of the mean hinge loss as the "
    "workers see it, each on its own rows; arrived loss that of the weights in the global tier. target: "
    "the loss of the first sequential training after half of its epochs and 1 % more, fixed before."
)


def time_rows(timed: list[Record]) -> Iterable[Record]:
    """A row for each size, system and number of workers."""
    groups = _groups(timed)
    for (size, system, workers), found in groups.items():
        seconds = [each["train_s"] for each in found]
        reached = [each["target_s"] for each in found if each["target_s"] is not None]
        row = {
            "size": size,
            "system": system,
            "workers": workers,
            "seeds": len(found),
            "train_s": median(seconds),
            "train_s_range": _range(seconds),
            "first_epoch_s": median(each["epoch_ends_s"][0] for each in found),
        }
        for base in (1, 2):
            other = groups.get((size, system, base))
            faster = None
            if other and system in MODES:
                faster = median(each["train_s"] for each in other) / median(seconds)
            row[f"faster_than_{base}"] = faster
        yield row | {
            "target_s": median(reached) if len(reached) * 2 > len(found) else None,
            "reached": f"{len(reached)}/{len(found)}",
            "loss": median(each["loss"] for each in found),
            "arrived_loss": _median(found, "arrived_loss"),
            "accuracy": _median(found, "accuracy"),
            "instances": _median(found, "instances"),
        }


BYTES_NOTE = (
    "MB of values that instances exchanged with the global tier in a training, medians over seeds. With a "
    "shared tier the inputs are fetched once per host. Weights are read again after every push, except where "
    "the host knows that it alone has pushed since it read them; a sum is always read again."
)


def bytes_rows(timed: list[Record]) -> Iterable[Record]:
    for (size, system, workers), found in _groups(timed).items():
        if system not in MODES:
            continue
        parts = {
            f"{name}_mb": median(each[f"{name}_bytes"] for each in found) / 1e6
            for name in ("inputs_pulled", "weights_pulled", "weights_pushed")
        }
        yield {
            "size": size,
            "system": system,
            "workers": workers,
            **parts,
            "total_mb": median(total_bytes(each) for each in found) / 1e6,
            "syncs": median(each["syncs"] for each in found),
        }


def total_bytes(record: Record) -> int:
    """All that a training exchanged, its ledger left out."""
    names = ("inputs_pulled_bytes", "weights_pulled_bytes", "weights_pushed_bytes")
    return sum(int(record[name]) for name in names)


MEMORY_NOTE = (
    "Medians over seeds. PSS counts a page that n processes share as 1/n in each; RSS counts it in each, "
    "as if they shared nothing. peak, integral: of all processes of the engine, workers, controller and "
    "spare processes included. instances: the processes that trained, alone; gb_s_instances is the "
    "paper's bill, the highest peak of one x workers x training time. All processes are forked from one, "
    "so they share the interpreter also where they share no state: containers would not. Memory of the "
    "global tier is in no bill."
)


def memory_rows(timed: list[Record]) -> Iterable[Record]:
    for (size, system, workers), found in _groups(timed).items():
        if system not in MODES:
            continue
        yield {
            "size": size,
            "system": system,
            "workers": workers,
            "copy_mb": _median(found, "instance_copy_bytes", 1e6),
            "instance_pss_mb": _median(found, "instance_peak_pss_mb"),
            "instances_pss_mb": _median(found, "instances_pss_mb"),
            "peak_pss_mb": _median(found, "peak_pss_mb"),
            "peak_rss_mb": _median(found, "peak_rss_mb"),
            "cpu_s": _median(found, "cpu_s"),
            "gb_s_instances": _median(found, "gb_s_instances"),
            "gb_s_peak": _median(found, "gb_s_peak"),
            "gb_s_integral": _median(found, "gb_s_integral"),
        }


LOST_NOTE = (
    "Runs of their own, since counting takes time. Beside each weight a counter is incremented with every "
    "update that changes the weight, and is read, written, pushed and pulled in the same way. The increments "
    "that the counters in the global tier lack at the end were overwritten; the weights lose their updates in "
    "the same way. In shared the loss is that of unlocked writes within the host, in copies that of pushes "
    "that overwrite those of other instances."
)


def lost_rows(records: list[Record]) -> Iterable[Record]:
    for each in records:
        if each.get("counting") and "updates_lost" in each:
            yield {
                "size": each["size"],
                "system": each["system"],
                "workers": each["workers"],
                "made": each["updates_noted"],
                "arrived": each["updates_arrived"],
                "lost": each["updates_lost"],
                "lost_percent": 100 * each["lost_share"],
                "epochs": each["epochs"],
            }


CHECK_NOTE = (
    "With one worker every mode does what the sequential loop does. shared and copies are equal to it bit "
    "by bit, in all weights and all losses; sum-delta adds differences, which rounds: its largest "
    "difference is said. scikit-learn regularises otherwise, so its row says whether the others are "
    "plausible."
)


def check_rows(records: list[Record]) -> Iterable[Record]:
    """Equality with one worker, and the library beside the sequential training."""
    for (size, system, workers), found in _groups(records).items():
        if workers == 1 and system in MODES:
            found = [each for each in found if "equal_to_sequential" in each]
            equal = sum(each["equal_to_sequential"] for each in found)
            yield {
                "size": size,
                "system": system,
                "equal_bit_by_bit": f"{equal}/{len(found)}",
                "largest_difference": max(
                    (each["largest_difference"] for each in found), default=None
                ),
                "loss": _median(found, "loss"),
                "accuracy": _median(found, "accuracy"),
            }
    for each in records:
        if each["system"] in ("scikit-learn", "sequential") and "accuracy" in each:
            if each["system"] == "sequential" and not each.get("data"):
                continue
            yield {
                "size": each["size"],
                "system": each["system"],
                "alpha": each.get("alpha"),
                "loss": each.get("arrived_loss", each.get("loss")),
                "accuracy": each["accuracy"],
            }


def data_rows(records: list[Record]) -> Iterable[Record]:
    for each in records:
        facts = each.get("data")
        if facts:
            lengths = facts["nonzeros_per_row"]
            plain = {name: value for name, value in facts.items() if name != "nonzeros_per_row"}
            yield {
                "size": each["size"],
                **plain,
                "nonzeros_per_row": " ".join(f"{name} {value}" for name, value in lengths.items()),
            }


CLAIM_NOTE = (
    "The paper's numbers are of 20 hosts with 4 cores each, RCV1, Faaslets against containers of Knative; "
    "those found of this host's cores, which all instances share, so that more workers than cores cannot "
    "train faster. Its abstract says 2x speed and 10x less memory; section 6.2 80 % faster with 38 "
    "functions than with 2 and 70 % less network."
)


def claim_rows(timed: list[Record], sizes: list[str]) -> Iterable[Record]:
    """What the paper found, and the same ratio of copies to shared here, at the most workers that both have."""
    groups = _groups(timed)
    for size in sizes:
        common = [
            workers
            for (of, system, workers) in groups
            if of == size and system == "shared" and (size, "copies", workers) in groups
        ]
        if not common:
            continue
        workers = max(common)
        shared, copies = (groups[size, system, workers] for system in ("shared", "copies"))

        def ratio(
            value: Callable[[Record], float | None],
            above: list[Record] = copies,
            below: list[Record] = shared,
        ) -> float | None:
            parts = [
                [found for each in side if (found := value(each)) is not None]
                for side in (above, below)
            ]
            if not all(parts) or not median(parts[1]):
                return None
            return median(parts[0]) / median(parts[1])

        for claim, paper, value, why in _CLAIMS:
            missed = sum(value(each) is None for each in copies)
            yield {
                "size": size,
                "workers": workers,
                "copies / shared": claim,
                "paper": paper,
                "found": ratio(value),
                "why it differs": f"{why}; missed in {missed} of {len(copies)}" if missed else why,
            }


_CLAIMS: tuple[tuple[str, str, Callable[[Record], float | None], str], ...] = (
    (
        "training time",
        "2x",
        lambda each: each.get("train_s"),
        "one host: copies cost memory traffic instead of a network of 1 Gbit/s",
    ),
    (
        "time to the target loss",
        "not said",
        lambda each: each.get("target_s"),
        "copies overwrite one another's pushes, so they need more epochs",
    ),
    (
        "bytes moved",
        "about 3x (70 % less)",
        lambda each: total_bytes(each) if "syncs" in each else None,
        "one host: its shared tier has what it pushed; on several hosts each reads the others' pushes",
    ),
    (
        "billable memory, the paper's formula",
        "10x",
        lambda each: each.get("gb_s_instances"),
        "instances are forked from one process and share its interpreter and libraries",
    ),
    (
        "memory of all processes, integral",
        "not said",
        lambda each: each.get("gb_s_integral"),
        "controller, worker and spare processes are in both",
    ),
)


def _groups(records: Iterable[Record]) -> dict[tuple[str, str, int], list[Record]]:
    """Records that differ in their seeds alone: by size, system and number of workers, in this order."""
    found: dict[tuple[str, str, int], list[Record]] = {}
    for each in records:
        if "workers" in each and "train_s" in each:
            key = (each["size"], each["system"], each["workers"])
            found.setdefault(key, []).append(each)
    return found


def _median(found: list[Record], name: str, unit: float = 1.0) -> float | None:
    values = [each[name] / unit for each in found if each.get(name) is not None]
    return median(values) if values else None


def _range(values: list[float]) -> str:
    return f"{min(values):.3g}-{max(values):.3g}"
