"""Three small runs are byte for byte what they were, on any hash seed (made by golden_runs.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from golden_runs import GOLDEN, LOGS, golden_specs
from slosched.sim.run import simulate
from slosched.telemetry.action_log import read_action_log
from slosched.telemetry.client_log import read_client_log
from slosched.telemetry.request_log import read_request_log


@pytest.mark.parametrize("name", list(golden_specs()))
def test_a_golden_run_keeps_every_byte(name: str, tmp_path: Path) -> None:
    result = simulate(golden_specs()[name], out=tmp_path / "run")
    assert result.run_dir is not None
    for log in LOGS:
        made = (result.run_dir / log).read_bytes()
        assert made == (GOLDEN / name / log).read_bytes(), (
            f"{name}/{log} changed; if that was meant: .venv/bin/python tests/golden_runs.py"
        )


@pytest.mark.parametrize("name", list(golden_specs()))
def test_the_golden_logs_say_something(name: str) -> None:
    """Enough rows to notice a change; loads and evictions, noise and stalls where they belong."""
    folder = GOLDEN / name
    requests = read_request_log(folder / LOGS[0])
    actions = read_action_log(folder / LOGS[1])
    clients = read_client_log(folder / LOGS[2])
    assert 50 < len(requests) == len(clients) < 1000 and len(actions) > 100
    kinds = {kind: int((actions["action_type"] == kind).sum()) for kind in (1, 2, 3)}
    assert kinds[2] > 50
    if name == "cold-closed-loops":
        assert kinds[1] > 50 and kinds[3] > 50
    if name == "noise-and-jitter":
        ran = actions["worker_exec_duration"][actions["action_type"] == 2]
        assert len(set(ran.tolist())) > 100 and int(ran.max()) > 10_000_000


def test_the_runs_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """The other tests run with whatever seed pytest got; here two that differ."""
    program = (
        "import sys; from pathlib import Path; from golden_runs import golden_specs\n"
        "from slosched.sim.run import simulate\n"
        "simulate(golden_specs()['noise-and-jitter'], out=Path(sys.argv[1]))"
    )
    for seed in ("0", "4242"):
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "tests:src"},
            timeout=60,
            check=True,
        )
    for log in LOGS:
        expected = (GOLDEN / "noise-and-jitter" / log).read_bytes()
        assert (tmp_path / "0" / log).read_bytes() == expected
        assert (tmp_path / "4242" / log).read_bytes() == expected
