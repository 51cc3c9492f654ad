"""Results in the form of the original's: `<user>_<func>/SYSTEM_..._logs/` with its file names, keys and units.

An experiment puts what one of the functions here returns into the field `published` of a record. `--layout
faasm` writes the folders of all such records. Where a configuration was repeated, RUN_TIME.log has the total,
as the original's, and the other files are the last repeat's. Systems that the original does not have are named
in the same form: SYSTEM_DASK_....
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

from slosched.faasm.billing import HOST_SUFFIX, host_log_name
from slosched.faasm.billing_host import summary_text
from slosched.faasm.names import REPLACED
from slosched.output_files import make_folder, write_file
from slosched.units import NS_PER_MS

#: The field of a record.
PUBLISHED = "published"
#: What the two published systems are called.
WARM, NATIVE = "FAASM", "NATIVE"
RUN_TIME, LATENCY, BILLING_SUMMARY = "RUN_TIME.log", "latency.txt", "billing_summary.txt"
#: A file that the original does not have: what is replaced here.
NOTE = "REPLACED.txt"
SGD_OUTPUT, MATRICES_OUTPUT, INFERENCE_OUTPUT = (
    "NODE_0_SGD_LOSS.log",
    "NODE_0_MAT_MUL.log",
    "NODE_0_INFERENCE.log",
)
_SGD, _MATRICES, _INFERENCE = "sgd_reuters_svm", "python_mat_mul", "tf_image"

Published = dict[str, Any]


def sgd(
    system: str, *, workers: int, interval: int, run_ns: int, losses: Sequence[tuple[float, float]]
) -> Published:
    """One run of sgd. `losses` has (seconds, loss) for each epoch; seconds count from the end of the first."""
    first_s = losses[0][0] if losses else 0.0
    text = "".join(f"{seconds - first_s:.4f} {loss:.4f}\n" for seconds, loss in losses)
    name = f"SYSTEM_{_system(system)}_WORKERS_{workers}_INTERVAL_{interval}_logs"
    return _published(_SGD, name, run_ns, workers, {SGD_OUTPUT: text})


def matrices(
    system: str, *, size: int, splits: int, workers: int, run_ns: int, output: str = "SUCCESS"
) -> Published:
    """One product of matrices of size x size. `output` is what the function returned."""
    name = f"SYSTEM_{_system(system)}_MATRIX_{size}_SPLITS_{splits}_WORKERS_{workers}_logs"
    return _published(_MATRICES, name, run_ns, workers, {MATRICES_OUTPUT: output})


def inference(
    system: str,
    *,
    cold: int,
    threads: int,
    connections: int,
    delay_ms: float,
    run_ns: int,
    latencies_ns: Sequence[int],
) -> Published:
    """One run under load: `cold` is the interval of cold starts, `delay_ms` the largest think time.

    `latencies_ns` are those of all answered requests, without correction.
    """
    load = f"THREADS_{threads}_CONNS_{connections}_DELAY_{delay_ms:.10g}"
    name = f"SYSTEM_{_system(system)}_COLD_{cold}_{load}_logs"
    files = {LATENCY: latency_text(latencies_ns, run_ns), INFERENCE_OUTPUT: "No output"}
    return _published(_INFERENCE, name, run_ns, None, files)


def latency_text(latencies_ns: Sequence[int], run_ns: int) -> str:
    """latency.txt: all in microseconds; LATENCIES has 0 and then the percentiles 1 to 99 (nearest rank)."""
    ordered = sorted(each / 1000 for each in latencies_ns)
    if not ordered:
        ordered = [0.0]

    def percentile(share: int) -> int:
        rank = max(1, -(-share * len(ordered) // 100))
        return round(ordered[rank - 1])

    lines = [
        f"MIN={ordered[0]:.6f}",
        f"MAX={ordered[-1]:.6f}",
        f"STDDEV={pstdev(ordered):.6f}",
        f"DURATION={run_ns // 1000}",
        f"REQUESTS={len(latencies_ns)}",
        f"MEDIAN={percentile(50)}",
        f"90TH={percentile(90)}",
        f"10TH={percentile(10)}",
        "LATENCIES=" + ",".join(["0", *(str(percentile(share)) for share in range(1, 100))]),
    ]
    return "\n".join(lines) + "\n"


def write_published(records: Iterable[Mapping[str, Any]], run: Path, into: Path) -> list[Path]:
    """Write the folders of all records that have the field `published` below `into`; return them.

    `run` is the run's directory, whose billing logs are copied. Raises as write_file does.
    """
    by_folder: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if isinstance(made := record.get(PUBLISHED), Mapping):
            by_folder.setdefault(str(made["folder"]), []).append(record)
    return [_write(into / name, found, run) for name, found in by_folder.items()]


def _write(folder: Path, records: Sequence[Mapping[str, Any]], run: Path) -> Path:
    last = records[-1][PUBLISHED]
    make_folder(folder)
    total_ns = sum(int(each[PUBLISHED]["run_ns"]) for each in records)
    write_file(folder / RUN_TIME, f"{total_ns / NS_PER_MS}ms".encode())
    write_file(folder / NOTE, f"{REPLACED}\n".encode())
    for name, text in last["files"].items():
        write_file(folder / name, str(text).encode())
    log = run / "billing" / f"{records[-1].get('billing', '')}{HOST_SUFFIX}"
    if records[-1].get("billing") and log.is_file():
        place = folder / "billing" / "results" / host_log_name()
        make_folder(place.parent)
        shutil.copyfile(log, place)
        write_file(folder / BILLING_SUMMARY, summary_text([log], last.get("workers")).encode())
    return folder


def _published(
    function: str, name: str, run_ns: int, workers: int | None, files: Mapping[str, str]
) -> Published:
    return {
        "folder": f"{function}/{name}",
        "run_ns": run_ns,
        "workers": workers,
        "files": dict(files),
    }


def _system(name: str) -> str:
    return name.upper().replace(" ", "-").replace("_", "-").replace("/", "-")
