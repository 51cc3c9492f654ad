"""Reads HotCarbon's result trees, and our own in either layout.

A folder of results has tput.csv, total_p*.csv and pwr.csv. Each row of the first six is a run; pwr.csv is that
of the last one. Device and mode may be part of a folder's name ("4090-tm"); the mode of a row is in the row.
Files that are missing, short or odd are problems of that run, not errors: published trees have them. Where both
of our layouts are in one tree, a run counts once: that of its own folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from slosched.errors import InvalidConfig
from slosched.share.hotcarbon_files import PWR, ROWS, TOTALS, TPUT, known_keys
from slosched.share.imported import Imported, ImportedJob, of_metrics, with_solos
from slosched.share.outputs import SUMMARY, read_summary
from slosched.text_files import read_text

#: What its README calls the files that its code names total_p90.csv, ...
_SLIPS = {name: name.replace("_p", "_") for name in TOTALS}
_COLUMN = re.compile(r"\d+_(.+)-(\d+)")
_STAMP = re.compile(r"\d{4}/\d{2}/\d{2} \d{2}:\d{2}:\d{2}(\.\d{1,6})?")
#: Seconds at both ends of the window that are left out of the mean power.
_TRIM_S = 2.0
_MOST_FOLDERS = 10_000
DEFAULT_WINDOW_S = 120.0


def read_hotcarbon(
    root: Path, *, window_s: float | None = None, gpus: int = 0, gpu: int = 0
) -> tuple[Imported, ...]:
    """All runs below `root`, with STP and energy ratio where the tree has the models alone.

    Our own folders have a summary, which is read unless `window_s` is given. Power of others is the mean over
    the last `window_s` of pwr.csv (None: 120 s, its default duration), less 2 s at each end. Where pwr.csv has
    `gpus` GPUs in turn without an index (0: as their times tell), number `gpu` is meant. Raises InvalidConfig
    without any result.
    """
    if not root.is_dir():
        raise InvalidConfig(f"{root} is not a folder of results")
    if gpus < 0 or gpu < 0 or (gpus and gpu >= gpus):
        raise InvalidConfig(f"GPU {gpu} of {gpus} does not exist")
    if window_s is not None and not window_s > 2 * _TRIM_S:
        raise InvalidConfig(f"a window of {window_s:g} s is too short: more than {2 * _TRIM_S:g} s")
    folders = sorted({path.parent for path in root.rglob(TPUT)})
    if not folders:
        raise InvalidConfig(f"{root} has no results: there is no {TPUT} below it")
    if len(folders) > _MOST_FOLDERS:
        raise InvalidConfig(f"{root} has {len(folders):,} folders of results; name a part of it")
    runs = []
    for folder in folders:
        found = _read_folder(root, folder, window_s, gpus, gpu)
        keys = known_keys(folder / ROWS).get(TPUT, [])
        if keys and any(folder in each.parents for each in folders):
            found = [run for run in found if not "".join(keys[run.row : run.row + 1])]
        runs += found
    return with_solos(runs)


def _read_folder(
    root: Path, folder: Path, window_s: float | None, gpus: int, gpu: int
) -> list[Imported]:
    if window_s is None and (run := _our_run(folder)) is not None:
        return [run]
    problems: list[str] = []
    header, rows = _table(folder / TPUT, problems)
    models = [_COLUMN.fullmatch(column) for column in header[2:]]
    if header[:2] != ["mode", "load"] or not models or None in models:
        raise InvalidConfig(
            f"{folder / TPUT} does not begin with mode,load,0_MODEL-BATCH,..: {','.join(header)[:100]!r}"
        )
    named = [(match[1], int(match[2])) for match in models if match]
    totals = [_total(folder, name, header, len(rows), problems) for name in TOTALS]
    ours, repeat = _ours(folder)
    seconds = window_s or ours or DEFAULT_WINDOW_S
    watts = None
    if rows:
        watts = _watts(folder / PWR, seconds, gpus, gpu, problems)
    mixed = "_".join(f"{model}-{batch}" for model, batch in named)
    runs = []
    for place, row in enumerate(rows):
        jobs = []
        for column, (model, batch) in enumerate(named, 2):
            p0, p50, p90, p99, p100 = (
                _value(total[place], column) if total else None for total in totals
            )
            jobs.append(
                ImportedJob(
                    model=model,
                    batch=batch,
                    throughput_per_s=_value(row, column),
                    p0_ms=p0,
                    p50_ms=p50,
                    p90_ms=p90,
                    p99_ms=p99,
                    p100_ms=p100,
                )
            )
        last = place == len(rows) - 1
        runs.append(
            Imported(
                source="hotcarbon" if ours is None else "slosched",
                path=str(folder),
                label=_label(root, folder, mixed),
                mode=row[0],
                jobs=tuple(jobs),
                row=repeat + place,
                window_s=seconds,
                watts=watts if last else None,
                problems=tuple(problems),
            )
        )
    return runs


def _label(root: Path, folder: Path, mixed: str) -> str:
    """What the tree calls the device: the folder above the mix; without one, the folder's own name."""
    parts = [*root.resolve().parts, *folder.relative_to(root).parts]
    # A run alone that differs in more than model and batch has a digest behind them.
    found = [at for at, part in enumerate(parts) if part.partition("@")[0] == mixed and at >= 2]
    return parts[found[-1] - 2] if found else parts[-1]


def _our_run(folder: Path) -> Imported | None:
    """Our own run, by the summary beside its files: it knows which run alone is that of which job."""
    try:
        summary = read_summary(folder / SUMMARY)
    except InvalidConfig:
        return None
    metrics = summary.metrics
    return of_metrics(metrics, label=summary.label, mode=summary.mode, path=str(folder))


def _ours(folder: Path) -> tuple[float | None, int]:
    """The window in s and the repeat, where a summary of our own lies beside; None without one."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        return float(summary["metrics"]["window_s"]), int(summary["repeat"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0


def _table(path: Path, problems: list[str]) -> tuple[list[str], list[list[str]]]:
    """The header and the complete rows."""
    lines = [line.split(",") for line in read_text(path, "").splitlines() if line]
    if not lines:
        raise InvalidConfig(f"{path} is empty")
    header = [cell.strip() for cell in lines[0]]
    rows = [row for row in lines[1:] if len(row) == len(header)]
    if len(rows) < len(lines) - 1:
        problems.append(f"{path.name}: {len(lines) - 1 - len(rows)} incomplete rows")
    if not rows:
        problems.append(f"{path.name} has no row")
    return header, rows


def _total(
    folder: Path, name: str, header: Sequence[str], runs: int, problems: list[str]
) -> list[list[str]] | None:
    path = folder / name
    if not path.exists():
        path = folder / _SLIPS[name]
    if not path.exists():
        problems.append(f"{name} is missing")
        return None
    found, rows = _table(path, problems)
    if found != list(header) or len(rows) != runs:
        problems.append(f"{path.name} does not match {TPUT}")
        return None
    return rows


def _value(row: Sequence[str], column: int) -> float | None:
    try:
        value = float(row[column])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------ power


def _watts(path: Path, window_s: float, gpus: int, gpu: int, problems: list[str]) -> float | None:
    """The mean power of one GPU in the last `window_s`, weighted by time; None if that is not known."""
    if not path.exists():
        problems.append(f"{path.name} is missing")
        return None
    stamps, watts, count = _one_gpu(path, gpus, gpu, problems)
    if len(stamps) < 2:
        problems.append(f"{path.name} has {len(stamps)} usable samples")
        return None
    if count > 1:
        problems.append(f"{path.name}: number {gpu} of {count} GPUs")
    at = np.array(stamps)
    span = at[-1] - at[0]
    if span < window_s:
        problems.append(f"{path.name} has {span:.0f} s of the window's {window_s:.0f} s")
    low, high = max(at[0], at[-1] - window_s + _TRIM_S), at[-1] - _TRIM_S
    if high <= low:
        problems.append(f"{path.name} is too short for a mean power")
        return None
    between = (at > low) & (at < high)
    times = np.concatenate(([low], at[between], [high]))
    drawn = np.interp(times, at, np.array(watts))
    return float(np.sum((drawn[1:] + drawn[:-1]) / 2 * np.diff(times)) / (high - low))


def _one_gpu(
    path: Path, gpus: int, gpu: int, problems: list[str]
) -> tuple[list[float], list[float], int]:
    """Times in s and watts of one GPU, and the number of GPUs. What the card did not say is left out."""
    lines = read_text(path, "").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line]
    header = rows[0] if rows else []
    power = next((at for at, name in enumerate(header) if name.startswith("power.draw")), -1)
    if "timestamp" not in header or power < 0:
        problems.append(f"{path.name} has no columns timestamp and power.draw")
        return [], [], 1
    when, index = header.index("timestamp"), header.index("index") if "index" in header else -1
    whole = [row for row in rows[1:] if len(row) == len(header) and _STAMP.fullmatch(row[when])]
    if len(whole) < len(rows) - 1:
        problems.append(f"{path.name}: {len(rows) - 1 - len(whole)} incomplete rows")
    times = [_seconds(row[when]) for row in whole]
    if index >= 0:
        count = len({row[index] for row in whole})
        mine = [at for at, row in enumerate(whole) if row[index] == str(gpu)]
    else:
        count = gpus or _gpus(times)
        mine = list(range(gpu, len(whole), count)) if gpu < count else []
    found = [(times[at], _number(whole[at][power])) for at in mine]
    known = [(at, value) for at, value in found if value is not None]
    if len(known) < len(found):
        problems.append(f"{path.name}: {len(found) - len(known)} samples without power")
    rising = [row for row, before in zip(known[1:], known, strict=False) if row[0] > before[0]]
    known = [*known[:1], *rising]
    return [at for at, _ in known], [value for _, value in known], count


def _gpus(times: Sequence[float]) -> int:
    """GPUs that take turns: rows until the time makes a step, most often."""
    if len(times) < 3:
        return 1
    gaps = np.diff(np.array(times))
    step = float(np.quantile(gaps, 0.95)) / 2
    if step <= 0:
        return 1
    ends = np.flatnonzero(gaps > step)
    sizes = np.diff(np.concatenate(([-1], ends)))
    values, counts = np.unique(sizes, return_counts=True)
    return int(values[np.argmax(counts)]) if len(values) else 1


def _seconds(stamp: str) -> float:
    pattern = "%Y/%m/%d %H:%M:%S.%f" if "." in stamp else "%Y/%m/%d %H:%M:%S"
    # A log has no zone, and differences alone are of use.
    return (datetime.strptime(stamp, pattern) - datetime(1970, 1, 1)).total_seconds()


def _number(cell: str) -> float | None:
    """ "391.20 W" as 391.2; None for "[N/A]"."""
    try:
        value = float(cell.split()[0])
    except (ValueError, IndexError):
        return None
    return value if math.isfinite(value) else None
