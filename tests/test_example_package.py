"""The example package of docs/my_own_policy.md, built, installed into a folder and used by commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import slosched
from slosched.experiment.children import Children
from slosched.telemetry.manifest import read_manifest

PACKAGE = Path(__file__).parent.parent / "clients" / "example_package"
WAVES = ("waves", "resnet50_v2", "20", "100ms", "1s", "100ms")

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, built from a copy: setuptools writes beside its source."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    done = subprocess.run(
        [
            *pip,
            "--no-index",
            "--no-build-isolation",
            "--target",
            folder / "site",
            folder / "source",
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(autouse=True)
def importable(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the processes that a test starts, and not in its own."""
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{known}" if known else str(site))


def run(*arguments: str, folder: Path, module: str = "slosched") -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


def from_outside(directory: Path) -> dict[str, str]:
    """target -> package and version, of a simulation's manifest."""
    found = read_manifest(directory)["config"]["from_outside"]
    assert all(each["sha256"] for each in found)
    return {each["target"]: f"{each['package']} {each['version']}" for each in found}


def test_its_own_tests_pass(tmp_path: Path) -> None:
    shutil.copy(PACKAGE / "test_slosched_example.py", tmp_path)
    assert "passed" in run("-q", "-p", "no:cacheprovider", folder=tmp_path, module="pytest")


def test_simulations_here_and_in_other_processes(tmp_path: Path) -> None:
    out = run("simulate", "NEWEST", *WAVES, "--gpus", "1", "--out", "one", folder=tmp_path)
    assert "waves: 20 requests to resnet50_v2 every 100ms, for 1s; NEWEST on 1 GPU" in out
    assert from_outside(tmp_path / "one") == {
        "slosched_example.policy:NewestFirst": "slosched-example 1.0",
        "slosched_example.workload:Waves": "slosched-example 1.0",
    }
    again = ("compare", "NEWEST,FIFO", *WAVES, "--gpus", "1", "--seeds", "1", "--jobs", "2")
    for _ in range(2):  # the second time it reads back what the first one ran
        out = run(*again, "--out", "both", folder=tmp_path)
        assert "NEWEST" in out and "FIFO" in out
    assert len(list(tmp_path.glob("both/*/*/manifest.json"))) == 2
    assert "scheduler TYPE NEWEST from slosched-example 1.0" in run(
        "doctor", "--seconds", "0.1", folder=tmp_path
    )


def test_a_live_run(tmp_path: Path) -> None:
    local = ("--bind", "127.0.0.1", "--port", "0")
    with Children() as children:
        worker = children.start(
            "worker", ["worker", "--device", "sums", *local], tmp_path / "w.log"
        )
        port = children.wait_ready(worker, within_s=60)
        arguments = ["controller", "NEWEST", "--workers", f"127.0.0.1:{port}", *local]
        arguments += ["--http-port", "-1", "--log-dir", str(tmp_path / "run")]
        controller = children.start("controller", arguments, tmp_path / "c.log")
        address = f"127.0.0.1:{children.wait_ready(controller, within_s=60)}"
        out = run("client", address, *WAVES, "--out", "client", folder=tmp_path)
        assert "waves: 20 requests to resnet50_v2" in out
        with slosched.Client(address) as client:
            [model] = client.load("resnet50_v2")
            for value in (1.0, 2.0):
                image = np.full((3, 224, 224), value / 2**16, np.float32)
                answer = client.infer(model, image, slo=10.0)
                assert answer.output is not None
                assert np.allclose(answer.output, image.sum())
            status = client.status()
        text = run("status", address, folder=tmp_path)
    assert status["policy_package"] == "slosched-example 1.0"
    assert [each["device"] for each in status["workers"]] == ["sums (slosched-example 1.0)"]
    assert "NEWEST (best, from slosched-example 1.0)" in text
    assert "device sums: slosched_example.backend:SumsBackend of slosched-example 1.0" in (
        (tmp_path / "w.log").read_text()
    )
    assert "answering with sums" in (tmp_path / "w.log").read_text()
    for folder, target in (("run", "policy:NewestFirst"), ("client", "workload:Waves")):
        manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
        assert [each["target"] for each in manifest["from_outside"]] == [
            f"slosched_example.{target}"
        ]
