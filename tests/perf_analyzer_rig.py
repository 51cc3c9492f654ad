"""Runs Triton's perf_analyzer against a gateway, and reads what it reports.

`make install` fetches it (tests/get_perf_analyzer.py). Without it, or without Debian's libb64-0d, its tests are
skipped, except where SLOSCHED_PERF_ANALYZER_TESTS=required says that they must run (.ci/run).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = Path(sys.prefix) / "tools"
_BINARY = TOOLS / "perf_analyzer"
_WITHIN_S = 60
_THROUGHPUT = re.compile(r"Throughput: ([0-9.e+]+) infer/sec")
_INFERENCES = re.compile(r"Inference count: (\d+)")


@dataclass(frozen=True)
class Report:
    """How a run ended. 0 where it reported none.

    `throughput` is inferences per second, and `inferences` how many the server counted meanwhile.
    """

    code: int
    throughput: float
    inferences: int
    text: str


def analyze(model: str, url: str, *arguments: str) -> Report:
    """Run perf_analyzer on `model` of the server at `url` (host:port)."""
    done = _run("-m", model, "-u", url, *arguments)
    text = done.stdout + done.stderr
    rates, counts = _THROUGHPUT.findall(text), _INFERENCES.findall(text)
    return Report(
        code=done.returncode,
        throughput=float(rates[-1]) if rates else 0.0,
        inferences=int(counts[-1]) if counts else 0,
        text=text,
    )


def missing() -> str:
    """Why perf_analyzer cannot run here; "" if it can."""
    if not _BINARY.exists():
        return f"no perf_analyzer in {TOOLS}: python tests/get_perf_analyzer.py {TOOLS}"
    done = _run("--version")
    if done.returncode:
        return f"perf_analyzer does not start (Debian's libb64-0d?): {done.stderr.strip()}"
    return ""


def needed() -> None:
    """Skip the test where perf_analyzer cannot run, or fail it where it must."""
    if not (reason := missing()):
        return
    if os.environ.get("SLOSCHED_PERF_ANALYZER_TESTS") == "required":
        pytest.fail(f"{reason}; SLOSCHED_PERF_ANALYZER_TESTS says that it is needed")
    pytest.skip(reason)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(_BINARY), *arguments],
        capture_output=True,
        text=True,
        timeout=_WITHIN_S,
        env={**os.environ, "LD_LIBRARY_PATH": str(TOOLS)},
    )
