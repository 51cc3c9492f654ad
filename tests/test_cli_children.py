"""The demo's children: ready lines, deaths with their reason, and no child left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slosched.experiment.children import ChildFailed, Children

pytestmark = pytest.mark.processes

READY = "print('slosched worker ready on 127.0.0.1:4711: it', flush=True); "
SLEEP = "import time; time.sleep(60)"


def python(*, stop_within_s: float = 8.0) -> Children:
    """Children that run Python code instead of slosched."""
    return Children((sys.executable, "-c"), stop_within_s=stop_within_s)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ready_gives_the_port_and_leaving_ends_the_child(tmp_path: Path) -> None:
    with python() as children:
        child = children.start("worker", [READY + SLEEP], tmp_path / "log")
        assert children.wait_ready(child, within_s=30) == 4711
        children.check()
        pid = child.process.pid
    assert not is_alive(pid)


def test_a_child_that_dies_says_why(tmp_path: Path) -> None:
    code = "import sys; print('slosched: error: port 1 is in use', file=sys.stderr); sys.exit(4)"
    with python() as children:
        child = children.start("worker", [code], tmp_path / "log")
        with pytest.raises(ChildFailed, match=r"exit code 4: slosched: error: port 1 is in use"):
            children.wait_ready(child, within_s=30)
        with pytest.raises(ChildFailed, match="exit code 4"):
            children.check()


def test_a_child_that_never_becomes_ready_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with (
        python() as children,
        pytest.raises(ChildFailed, match=r"not ready within 0 s.*it wrote nothing"),
    ):
        children.wait_ready(children.start("worker", [SLEEP], tmp_path / "log"), within_s=0.3)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + SLEEP
    with python(stop_within_s=0.3) as children:
        child = children.start("worker", [stubborn], tmp_path / "log")
        children.wait_ready(child, within_s=30)
    assert child.process.returncode == -signal.SIGKILL


def test_all_end_also_after_an_error_in_the_command(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), python() as children:
        started = [children.start(f"c{i}", [SLEEP], tmp_path / f"log{i}") for i in range(3)]
        raise KeyboardInterrupt
    assert not any(is_alive(child.process.pid) for child in started)


def test_a_child_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    parent_code = f"""
import time
from pathlib import Path
from slosched.experiment.children import Children
children = Children()
arguments = ["worker", "--device", "emulated", "--bind", "127.0.0.1", "--port", "0"]
child = children.start("worker", arguments, Path({str(tmp_path / "log")!r}))
children.wait_ready(child, within_s=30)
print(child.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    finally:
        parent.kill()
        parent.communicate(timeout=10)
    for _ in range(100):
        if not _is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child outlived its parent by 10 s")


def _is_running(pid: int) -> bool:
    """False for a process that is gone, or is a zombie that no process has reaped yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
