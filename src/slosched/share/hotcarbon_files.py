"""HotCarbon's seven result files: tput.csv, total_p0 .. total_p100.csv and pwr.csv.

Its code writes total_p90.csv, total_p99.csv and total_p100.csv; the names total_90.csv, total_99.csv and
total_100.csv in its README are slips. Latencies are in ms with numpy's interpolation whatever their number;
throughput, in requests/s, is that of the common window (HotCarbon divided by each process's own span). A job
without a request has "nan". pwr.csv is nvidia-smi's output once a second.

In a tree of HotCarbon's own layout the runs of one mix append rows to the same files, and pwr.csv is that of
the last. A file beside them remembers which run each row is of, so a run that is written again has one row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from slosched.errors import InvalidConfig
from slosched.output_files import write_file
from slosched.share.job_figures import counted, work_of
from slosched.share.latency import PERCENTILES, percentiles
from slosched.share.result_paths import column_names, jobs_of, mix_path, mode_name
from slosched.share_spec import PowerSample, RunResult, ShareSpec
from slosched.text_files import read_text
from slosched.units import NS_PER_MS, NS_PER_S

TPUT, PWR = "tput.csv", "pwr.csv"
TOTALS = tuple(f"total_p{percentile}.csv" for percentile in PERCENTILES)
PWR_HEADER = (
    "timestamp, name, pstate, temperature.gpu, memory.total [MiB], memory.free [MiB], memory.used [MiB], "
    "utilization.memory [%], utilization.gpu [%], power.draw [W]"
)
#: Which run each row of a shared tree is of. Rows that are not ours have "".
ROWS = ".slosched-rows.json"
_MIB = 1024 * 1024
_NONE = "[N/A]"

Table = list[list[str]]


def hotcarbon_rows(spec: ShareSpec, result: RunResult) -> dict[str, list[str]]:
    """The row of each of the six files, by the file's name."""
    jobs = jobs_of(spec, result)
    before = [mode_name(result.mode, jobs), "1.0"]
    window_s = (result.end_ns - result.begin_ns) / NS_PER_S
    rows = {TPUT: list(before), **{name: list(before) for name in TOTALS}}
    for found in result.jobs:
        latencies = [row.latency_ns for row in counted(found, result)]
        work = work_of(found, result)
        rows[TPUT].append(repr(work / window_s) if latencies and window_s > 0 else "nan")
        values = percentiles(latencies) if latencies else [float("nan")] * len(TOTALS)
        for name, value in zip(TOTALS, values, strict=True):
            rows[name].append(repr(value))
    return rows


def hotcarbon_files(spec: ShareSpec, result: RunResult) -> dict[str, bytes]:
    """The seven files with the one row of this run."""
    header = ["mode", "load", *column_names(jobs_of(spec, result))]
    files = {
        name: _text([header, row]).encode() for name, row in hotcarbon_rows(spec, result).items()
    }
    files[PWR] = pwr_csv(spec, result).encode()
    return files


def check_trees(spec: ShareSpec, results_root: Path) -> None:
    """Raise InvalidConfig if `append_to_tree` would for a run of `spec`. Call it before long work."""
    for jobs in (list(spec.jobs), *([job] for job in spec.jobs)):
        header = ["mode", "load", *column_names(jobs)]
        for name in (TPUT, *TOTALS):
            _table(results_root / spec.label / mix_path(jobs) / name, header)


def append_to_tree(folder: Path, spec: ShareSpec, result: RunResult, key: str) -> list[Path]:
    """Write this run into `folder` of HotCarbon's own layout: append its row, or replace that of `key`.

    Raises InvalidConfig if files there are of another mix or are not of this form; nothing is written then.
    """
    header = ["mode", "load", *column_names(jobs_of(spec, result))]
    known = known_keys(folder / ROWS)
    drafts = {}
    for name, row in hotcarbon_rows(spec, result).items():
        table = _table(folder / name, header)
        # Rows may have gone with their file, or come from another program.
        keys = (known.get(name, []) + [""] * len(table))[: len(table)]
        if key in keys:
            table[keys.index(key)] = row
        else:
            table.append(row)
            keys.append(key)
        known[name] = keys
        drafts[name] = _text([header, *table]).encode()
    drafts[PWR] = pwr_csv(spec, result).encode()
    for name, content in drafts.items():
        write_file(folder / name, content)
    write_file(folder / ROWS, json.dumps(known).encode() + b"\n")
    return [folder / name for name in drafts]


def pwr_csv(spec: ShareSpec, result: RunResult) -> str:
    """nvidia-smi's table, once a second, with units in its cells.

    The time of day is that of the run if it says how far its clock was from it ("epoch_minus_monotonic_ns" in
    `about`), else it counts from 1970.
    """
    name = result.about.get("gpu", "") or spec.label
    offset_ns = epoch_offset_ns(result.about) or 0
    lines = [PWR_HEADER]
    due_ns = result.power[0].at_ns if result.power else 0
    for sample in result.power:
        if sample.at_ns < due_ns:
            continue
        due_ns = max(due_ns + NS_PER_S, sample.at_ns + NS_PER_S // 2)
        lines.append(_pwr_line(sample, name, sample.at_ns + offset_ns))
    return "\n".join(lines) + "\n"


def epoch_offset_ns(about: Mapping[str, str]) -> int | None:
    """What turns a run's times into times since 1970; None if it does not say."""
    try:
        return int(about["epoch_minus_monotonic_ns"])
    except (KeyError, ValueError):
        return None


# ------------------------------------------------------------------------------------------ small parts


def _pwr_line(sample: PowerSample, name: str, epoch_ns: int) -> str:
    stamp = datetime.fromtimestamp(epoch_ns // NS_PER_S, UTC)
    total, used = sample.memory_total, sample.memory_used
    free = total - used if total >= 0 and used >= 0 else -1
    cells = [
        f"{stamp:%Y/%m/%d %H:%M:%S}.{epoch_ns % NS_PER_S // NS_PER_MS:03d}",
        name.replace(",", " "),
        f"P{sample.pstate}" if sample.pstate >= 0 else _NONE,
        str(sample.temperature) if sample.temperature >= 0 else _NONE,
        *(f"{size // _MIB} MiB" if size >= 0 else _NONE for size in (total, free, used)),
        *(
            f"{share} %" if share >= 0 else _NONE
            for share in (sample.memory_utilization, sample.utilization)
        ),
        f"{sample.watts:.2f} W" if sample.watts >= 0 else _NONE,
    ]
    return ", ".join(cells)


def _text(table: Sequence[Sequence[str]]) -> str:
    return "".join(",".join(row) + "\n" for row in table)


def _table(path: Path, header: Sequence[str]) -> Table:
    """The rows of the file without its header; an empty list if there is no file."""
    if not path.exists():
        return []
    table = [line.split(",") for line in read_text(path, "").splitlines() if line]
    if not table:
        return []
    if table[0] != list(header):
        raise InvalidConfig(
            f"{path} has the columns {','.join(table[0])[:200]}, and not {','.join(header)[:200]}: it is of "
            "another mix; choose another folder for the results"
        )
    return table[1:]


def known_keys(path: Path) -> dict[str, list[str]]:
    """Which run each row of each file is of; nothing where that is not remembered."""
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(read_text(path, ""), type=dict[str, list[str]])
    except msgspec.DecodeError:
        return {}
