"""Functions for GPUs whose calls have host parts: tests/test_function_host_parts.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import slosched
from slosched.clock import sleep_ns


def _wait_for(path: str) -> None:
    while not Path(path).exists():
        sleep_ns(1_000_000)


def _prepare(ctx: Any, what: str, path: str = "") -> tuple[int, str]:
    if what == "raises":
        raise RuntimeError("no such network")
    if what == "exits":
        os._exit(3)
    if path:
        _wait_for(path)
    return os.getpid(), f"{what} of {ctx.function}"


@slosched.function(gpu=True, prepare=_prepare)
def builds(ctx: Any, what: str, path: str = "") -> tuple[int, int, str]:
    pid, made = ctx.prepared
    return pid, os.getpid(), made


@slosched.function(gpu=True, prepare=_prepare, limit="500ms")
def builds_within(ctx: Any, what: str, path: str = "") -> None: ...


@slosched.function(gpu=True)
def waits_on_lane(ctx: Any, path: str) -> int:
    _wait_for(path)
    return os.getpid()


@slosched.function(gpu=True, reset="reload")
def new_each_time(ctx: Any) -> int:
    return os.getpid()
