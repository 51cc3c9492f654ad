"""What `slosched worker --functions` runs on when no device is named: the host alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.cli import worker as worker_command
from slosched.cli.app import app
from slosched.config import WorkerConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[WorkerConfig]:
    """The configs that would be served."""
    found: list[WorkerConfig] = []

    def serve(config: WorkerConfig, gpus: int | None) -> int:
        found.append(config)
        return 0

    monkeypatch.setattr(worker_command, "_serve", serve)
    return found


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["worker", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_functions_alone_need_no_gpu_and_no_models(served: list[WorkerConfig]) -> None:
    said = run("--functions", "my_functions", "--slots", "2")
    assert served[0].device == "none"
    assert "functions alone" in said and "--device auto" in said


@pytest.mark.parametrize(
    ("more", "device"),
    [
        (("--device", "auto"), "auto"),
        (("--device", "cpu"), "cpu"),
        (("--gpus", "2"), "auto"),
        (("--libraries", "timm"), "auto"),
    ],
)
def test_who_names_a_device_or_models_has_them_beside_functions(
    served: list[WorkerConfig], more: tuple[str, ...], device: str
) -> None:
    assert "functions alone" not in run("--functions", "my_functions", *more)
    assert served[0].device == device


def test_without_functions_nothing_changes(served: list[WorkerConfig]) -> None:
    run()
    assert served[0].device == "auto"


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ('functions = ["my_functions"]\n', "none"),
        ('functions = ["my_functions"]\ndevice = "auto"\n', "auto"),
        (
            'functions = ["my_functions"]\n[models.m]\nfactory = "m:make"\ninput_shape = [1]\n',
            "auto",
        ),
        ("slots = 2\n", "auto"),
    ],
)
def test_a_file_says_it_as_the_command_line_does(
    served: list[WorkerConfig], tmp_path: Path, text: str, device: str
) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(text)
    run("--config", str(file))
    assert served[0].device == device


def test_the_help_says_so() -> None:
    text = " ".join(CliRunner().invoke(app, ["worker", "--help"]).output.split())
    assert "none with --functions" in text
