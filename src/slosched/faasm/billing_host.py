"""What the whole host uses, as lines of the original's billing log: `<epoch seconds> <METRIC> <value>`.

The names are those of the published log, which takes them from psutil every 2 s; here they come from /proc.
Memory and traffic are in MB of 2**20 bytes, CPU times in seconds since the machine started. The summary is the
published one: for each metric the largest value less the least, summed over hosts. Everything that runs on the
host is in it, so what a run uses is better taken from its processes (billing.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from slosched.errors import InvalidConfig

Metrics = dict[str, float]

_MB = float(1 << 20)
_KB_IN_MB = 1024.0
_SECTOR_MB = 512 / _MB
_CPU_FIELDS = ("USER", "SYSTEM", "IDLE", "IOWAIT")
#: Whole disks, not their partitions, which would count twice.
_DISK = re.compile(r"(?:sd[a-z]+|vd[a-z]+|xvd[a-z]+|nvme\d+n\d+|mmcblk\d+)$")
#: Metric of the log -> what the published summary calls it.
SUMMARY = {
    "NET_SENT_MB": "NET_SENT_MB",
    "NET_RECV_MB": "NET_RECV_MB",
    "DISK_WRITE_MB": "DISK_WRITE_MB",
    "CPU_TIME_USER": "CPU_USER",
    "CPU_TIME_IOWAIT": "CPU_IOWAIT",
    "CPU_TIME_IDLE": "CPU_IDLE",
    "MEMORY_USED": "PEAK_MEMORY",
}


class Host:
    """Reads the host's metrics. Shares of CPU time are those since the reading before."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, ...]] = {}

    def once(self) -> Metrics:
        """What does not change."""
        return {"CPU_COUNT": float(os.cpu_count() or 0), "CPU_FREQ": _frequency_mhz()}

    def read(self) -> Metrics:
        """The metrics now. What this system does not tell is left out."""
        found: Metrics = {}
        for part in (_memory, self._processors, _disks, _network):
            with suppress(OSError, ValueError, IndexError, KeyError):
                found |= part()
        return found

    def _processors(self) -> Metrics:
        found: Metrics = {}
        ticks_per_s = float(os.sysconf("SC_CLK_TCK"))
        for line in _lines("/proc/stat"):
            name, *words = line.split()
            if not name.startswith("cpu"):
                continue
            prefix = "CPU" if name == "cpu" else f"CPU_{name.removeprefix('cpu')}"
            user, nice, system, idle, iowait = (int(word) for word in words[:5])
            del nice
            ticks = (user, system, idle, iowait)
            everything = sum(int(word) for word in words[:8])
            for field, value in zip(_CPU_FIELDS, ticks, strict=True):
                found[f"{prefix}_TIME_{field}"] = value / ticks_per_s
            before = self._before.get(name)
            self._before[name] = (*ticks, everything)
            gone = everything - before[-1] if before else 0
            shares = [
                100.0 * (now - then) / gone if before and gone > 0 else 0.0
                for now, then in zip(ticks, before or ticks, strict=False)
            ]
            found[f"{prefix}_PCT"] = max(0.0, 100.0 - shares[2] - shares[3]) if gone > 0 else 0.0
            for field, share in zip(_CPU_FIELDS, shares, strict=True):
                found[f"{prefix}_PCT_{field}"] = share
        return found


def log_lines(epoch_ns: int, metrics: Mapping[str, float]) -> str:
    """The metrics as lines of the log."""
    return "".join(f"{epoch_ns / 1e9:.2f} {name} {value:.10g}\n" for name, value in metrics.items())


def read_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """A log's series: (epoch seconds, value) by metric. Raises InvalidConfig for another kind of file."""
    series: dict[str, list[tuple[float, float]]] = {}
    number = 0
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            number += 1
            time, metric, value = line.split(" ")
            series.setdefault(metric, []).append((float(time), float(value)))
    except (ValueError, UnicodeDecodeError):
        raise InvalidConfig(
            f"{path}:{number}: not a line of a billing log: <epoch> <METRIC> <value>"
        ) from None
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from None
    return series


def summary_text(logs: Iterable[Path], workers: int | None) -> str:
    """The published billing_summary.txt of the logs, one for each host."""
    series = [read_log(path) for path in logs]
    lines = [f"WORKERS {workers}"]
    for metric, name in SUMMARY.items():
        total = 0.0
        for each in series:
            values = [value for _, value in each.get(metric, ())]
            total += max(values) - min(values) if values else 0.0
        lines.append(f"{name} {total:.10g}")
    return "\n".join(lines) + "\n"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _memory() -> Metrics:
    kb = {line.split(":")[0]: float(line.split()[1]) for line in _lines("/proc/meminfo")}
    total, available = kb["MemTotal"], kb["MemAvailable"]
    used = total - available
    return {
        "MEMORY_USED": used / _KB_IN_MB,
        "MEMORY_ACTIVE": kb["Active"] / _KB_IN_MB,
        "MEMORY_USED_PCT": 100.0 * used / total,
        "MEMORY_AVAILABLE": available / _KB_IN_MB,
        "SWAP_USED": (kb["SwapTotal"] - kb["SwapFree"]) / _KB_IN_MB,
    }


def _disks() -> Metrics:
    read = written = 0
    for line in _lines("/proc/diskstats"):
        words = line.split()
        if _DISK.match(words[2]):
            read, written = read + int(words[5]), written + int(words[9])
    return {"DISK_READ_MB": read * _SECTOR_MB, "DISK_WRITE_MB": written * _SECTOR_MB}


def _network() -> Metrics:
    sent = received = 0
    for line in _lines("/proc/net/dev")[2:]:
        words = line.partition(":")[2].split()
        received, sent = received + int(words[0]), sent + int(words[8])
    return {"NET_SENT_MB": sent / _MB, "NET_RECV_MB": received / _MB}


def _frequency_mhz() -> float:
    """The highest clock of the first core; 0 where it is not known."""
    with suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()
        return float(text) / 1000
    with suppress(OSError, ValueError):
        for line in _lines("/proc/cpuinfo"):
            if line.startswith("cpu MHz"):
                return float(line.partition(":")[2])
    return 0.0
