"""`slosched plot` and the demo's own checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import slosched.analysis.fig7
import slosched.analysis.tables
import slosched.cli.demo
import slosched.daemon.backends
import slosched.daemon.profiler
from slosched.cli.app import app
from slosched.errors import MissingPackage
from slosched.messages import ModelInfo

# --------------------------------------------------------------------------------------- plot


def test_plot_passes_its_words_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[list[Path], Path, bool]] = []

    def plot_fig7(run_dirs: Sequence[Path], out: Path, *, published: bool) -> list[Path]:
        calls.append((list(run_dirs), out, published))
        return [out / "fig7.png"]

    monkeypatch.setattr(slosched.analysis.fig7, "plot_fig7", plot_fig7)
    monkeypatch.setattr(slosched.analysis.tables, "summarise_steps", lambda run_dir: [])
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    result = CliRunner().invoke(app, ["plot", "fig7", str(a), str(b), "--published", "--out", "o"])
    assert result.exit_code == 0, result.output
    assert "wrote o/fig7.png" in result.stdout
    result = CliRunner().invoke(app, ["plot", "fig7", str(b), "--json"])
    assert json.loads(result.stdout)["files"] == [str(b / "figures" / "fig7.png")]
    assert calls == [([a, b], Path("o"), True), ([b], b / "figures", False)]


# --------------------------------------------------------------------------------------- demo


@pytest.fixture
def phases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo's phases, by name, without their processes. Its sweeps count, unless the parameter says no."""
    valid = getattr(request, "param", True)
    ran: list[str] = []

    def phase(directory: Path, seconds: float) -> Path:
        ran.append(directory.name)
        directory.mkdir()
        document = {"sent": 10, "satisfaction_client_from_scheduled_send": 0.9, "valid": valid}
        (directory / "client.json").write_text(json.dumps(document))
        return directory

    monkeypatch.setattr(slosched.cli.demo, "_real_phase", phase)
    monkeypatch.setattr(slosched.cli.demo, "_emulated_phase", phase)
    monkeypatch.setattr(slosched.analysis.fig7, "plot_fig7", lambda runs, out: [])
    return ran


def test_the_demo_without_torch_says_so_and_runs_the_rest(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slosched.cli.demo, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d")])
    assert result.exit_code == 0, result.output
    assert phases == ["emulated"]
    assert "pip install slosched[torch,models]" in result.stdout


@pytest.mark.parametrize(
    ("phases", "said"),
    [(True, "the sweep counts"), (False, "the sweep is INVALID")],
    indirect=["phases"],
)
def test_the_demo_ends_with_a_verdict_and_what_to_do_next(
    phases: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slosched.cli.demo, "find_spec", lambda name: object())
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d")])
    assert result.exit_code == 0, result.output
    verdict, _, after = result.stdout.partition("\nverdict\n")[2].partition("\nnext\n")
    assert verdict.count(said) == len(phases) == 2
    assert ("slosched doctor" in verdict) == ("INVALID" in said)
    assert len([line for line in after.splitlines() if line.startswith("  ")]) == 3
    assert result.stdout.splitlines()[-1].endswith(str(tmp_path / "d"))


def test_the_demo_without_matplotlib_still_ends_well(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def plot_fig7(runs: Sequence[Path], out: Path) -> list[Path]:
        raise MissingPackage("matplotlib is not installed: pip install slosched[plot]")

    monkeypatch.setattr(slosched.cli.demo, "find_spec", lambda name: object())
    monkeypatch.setattr(slosched.analysis.fig7, "plot_fig7", plot_fig7)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d")])
    assert result.exit_code == 0, result.output
    assert phases == ["real", "emulated"]
    assert "no figure: matplotlib is not installed" in result.stdout


def test_a_demo_never_writes_into_a_directory_that_is_there(
    phases: list[str], tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 7
    assert "exists already" in result.stderr
    assert phases == []


@pytest.mark.parametrize(
    ("error", "fine"), [(0.0, True), (1e-5, True), (0.1, False), (np.nan, False)]
)
def test_the_demo_compares_outputs_with_a_direct_forward_pass(
    monkeypatch: pytest.MonkeyPatch, error: float, fine: bool
) -> None:
    info = ModelInfo(
        model_id=0,
        name="m",
        copy=0,
        batch_sizes=(1,),
        b1_ns=10**6,
        weights_ns=1,
        weights_bytes=1,
        input_shape=(2,),
        input_dtype="float32",
        output_shape=(2,),
        output_dtype="float32",
        random_weights=True,
        gpus_resident=0,
        clients=0,
        labels=(),
    )

    async def ask(controller: str, model: str) -> Any:
        return info, [np.ones(2, np.float32)], [np.array([3.0, 2.0 + error], np.float32)]

    monkeypatch.setattr(slosched.cli.demo, "_ask_for_outputs", ask)
    monkeypatch.setattr(
        slosched.daemon.backends, "reference_forward", lambda name, array: np.array([3.0, 2.0])
    )
    if fine:
        assert slosched.cli.demo._check_outputs("a:1", "m", "cpu") is info
    else:
        with pytest.raises(slosched.cli.demo.OutputsDiffer, match="differ from a direct forward"):
            slosched.cli.demo._check_outputs("a:1", "m", "cpu")
