"""Outputs into a directory whose name is not UTF-8, as file systems allow: every command, to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.config import ModelSource, WorkerConfig
from slosched.daemon.supervisor import child_argv
from slosched.errors import InvalidConfig
from slosched.output_files import utf8, utf8_document

_SWEEP = ("slo-exp-1", "resnet50_v2", "1", "poisson", "50", "10", "11", "1", "add", "1")
_MIX = Path(__file__).parent.parent / "workloads" / "plan-example.toml"


def test_texts_become_utf_8() -> None:
    assert utf8("a\u00b5") == "a\u00b5"
    assert utf8(os.fsdecode(b"a\xff/\xc2\xb5")) == "a\\xff/\u00b5"
    assert utf8("\ud800") == "\\ud800"
    odd = Path(os.fsdecode(b"\xfe"))
    assert utf8_document({odd: [odd, ("\udcfe", 1, None)]}) == {
        "\\xfe": ["\\xfe", ["\\xfe", 1, None]]
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / os.fsdecode(b"run\xff\xfe")
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    result = CliRunner().invoke(app, ["simulate", "INFER5", *_SWEEP, "--out", str(path / "run")])
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("trace", "RUN", "--json", "--out", "ODD/trace.json.gz"),
        ("report", "RUN", "--json", "--out", "ODD/report.html"),
        ("plot", "fig7", "RUN", "--json", "--out", "ODD/figures"),
        ("compare", "INFER5,FIFO", *_SWEEP, "--seeds", "1", "--json", "--out", "ODD/compare"),
        ("simulate", "INFER5", "replay", "RUN/client_log.tsv", "--json", "--out", "ODD/again"),
        ("azure-trace", "--rows", "5", "--minutes", "5", "--out", "ODD/azure"),
        (
            "plan",
            "--models",
            str(_MIX),
            "--rate",
            "500",
            "--slo",
            "50ms",
            "--gpus",
            "1..2",
            "--target",
            "0.9",
            "--duration",
            "2s",
            "--seeds",
            "1",
            "--json",
            "--out",
            "ODD/plan",
        ),
    ],
    ids=lambda words: words[0],
)
def test_every_command_ends_in_order(words: tuple[str, ...], odd: Path) -> None:
    given = [word.replace("RUN", str(odd / "run")).replace("ODD", str(odd)) for word in words]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert Path(given[-1]).exists()
    if "--json" in words:
        assert isinstance(json.loads(result.stdout), dict)


def test_the_manifest_shows_the_other_bytes(odd: Path) -> None:
    manifest = json.loads((odd / "run" / "manifest.json").read_bytes())
    assert manifest["spec_sha256"]
    assert b"\xff" not in (odd / "run" / "manifest.json").read_bytes()


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_stdout_takes_any_path(encoding: str, odd: Path) -> None:
    words = [
        "azure-trace",
        "--rows",
        "5",
        "--minutes",
        "5",
        "--out",
        str(odd / f"out-{encoding}"),
    ]
    ended = subprocess.run(
        [os.fsencode(word) for word in (sys.executable, "-m", "slosched", *words)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    written = ended.stdout
    assert b"run\xff\xfe/out-" in written or (b"run??/out-" in written and "ascii" in encoding)


def test_a_worker_whose_paths_cannot_be_told_to_its_processes_says_so() -> None:
    source = ModelSource("m", pt2=os.fsdecode(b"/models/\xff.pt2"), input_shape=(1,))
    with pytest.raises(InvalidConfig, match="is not UTF-8"):
        child_argv(WorkerConfig(models=(source,)))
