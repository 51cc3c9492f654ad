"""What every test run begins with: no test on a GPU where there is none, and slow_tests.txt marks slow ones.

A run of slow tests or of processes alone imports only the files that have some. PDFs are drawn with fonts that
take a quarter of the time.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that runs `make check &` in a script lets its children ignore Ctrl-C, and their children inherit that:
# the tests which send SIGINT would wait for an end that cannot come. A handler, however, is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    """A test that leaves a handler of signals behind would fail a later one that sends them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    left = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert left == before, "the test left a signal's handler behind"


def _gpu_here() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


_SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")


def _mark_slow(items: list[pytest.Item], *, all_collected: bool) -> None:
    """Mark the tests that slow_tests.txt names. Raises UsageError for a line that names none of its file."""
    tests = {f"{item.path.name}::{item.nodeid.partition('::')[2]}": item for item in items}
    slow: set[str] = set()
    for line in _SLOW_TESTS.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name = line.removeprefix("but ")
        named = {
            each for each in tests if each == name or each.startswith((f"{name}[", f"{name}::"))
        }
        file = f"{name.partition('::')[0]}::"
        if all_collected and not named and any(each.startswith(file) for each in tests):
            raise pytest.UsageError(f"{_SLOW_TESTS.name} names a test that is not there: {line}")
        slow = slow | named if line == name else slow - named
    for each in slow:
        tests[each].add_marker(pytest.mark.slow)


def _marks_of_all(config: pytest.Config) -> set[str]:
    """Marks that `-m` asks of each test, {"slow"} for "slow and not processes"; none where it has an "or"."""
    chosen: str = config.option.markexpr
    if "(" in chosen or "or" in chosen.split():
        return set()
    return set(chosen.split(" and "))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a file without a test of the marks that each must have; its imports alone take seconds."""
    marks = _marks_of_all(config) & {"slow", "processes", "quiet"}
    if collection_path.suffix != ".py" or not marks:
        return None
    text = collection_path.read_text(encoding="utf-8")
    if f"\n{collection_path.name}" in _SLOW_TESTS.read_text():
        text += "mark.slow"
    return True if any(f"mark.{each}" not in text for each in marks) else None


def _draw_quickly() -> None:
    """Type 42 fonts, which a user's PDFs have, are searched and cut for each figure."""
    style = sys.modules.get("slosched.analysis.style")
    if style is not None:
        style._LOOK["pdf.fonttype"] = 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    all_collected = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    _mark_slow(items, all_collected=all_collected and not config.option.ignore)
    _draw_quickly()
    # All of them: `pytest tests/gpu`, under five minutes.
    folder = Path(__file__).parent / "gpu"
    on_gpu = [item for item in items if folder in item.path.parents]
    if on_gpu and not _gpu_here():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))
