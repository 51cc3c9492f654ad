"""The demo's trained models through real processes: worker, controller, gateway, and a client's example."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from slosched.cli.demo_answers import check_answers, write_models
from slosched.cli.demo_gateway import ask_by_http
from slosched.cli.demo_models import DemoModel, Pitch
from slosched.cli.demo_sweeps import start_controller, start_worker
from slosched.experiment.children import Children

for package in ("torch", "transformers", "torchcrepe"):
    if find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed", allow_module_level=True)

pytestmark = [pytest.mark.torch, pytest.mark.processes]
ROOT = Path(__file__).parent.parent


class Cluster:
    """A worker on the CPU with the demo's quickest model, and a controller."""

    def __init__(self, children: Children, folder: Path, models: Sequence[DemoModel]) -> None:
        self.children, self.folder, self.models = children, folder, models
        self.repository = folder / "models"
        options = ("--device", "cpu", "--repository", str(self.repository))
        worker = start_worker(children, options, folder)
        _, self.controller = start_controller(children, worker, folder / "answers")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, Children() as children:
        patch.setattr("slosched.cli.demo_answers.demo_models", lambda: [Pitch()])
        models = write_models(folder / "models")
        yield Cluster(children, folder, models)


def test_served_answers_are_those_of_a_direct_pass_and_true(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    found = check_answers(cluster.controller, cluster.repository, cluster.models, "cpu")
    assert found[0].startswith("pitch     21 of 21 tones are within 50 cents")
    said = capsys.readouterr().out
    assert "  sine of 440 Hz -> 440.4 Hz, A4" in said.splitlines()
    assert "22 answers, of " in said and "equal a direct forward pass to within" in said


@pytest.mark.skipif(find_spec("httptools") is None, reason="needs slosched[gateway]")
def test_a_gateway_answers_the_same_by_plain_http(cluster: Cluster) -> None:
    answers = cluster.folder / "answers"
    line = ask_by_http(
        cluster.children, cluster.controller, answers, cluster.repository, cluster.models, "cpu"
    )
    assert line.startswith("gateway   one answer by plain HTTP: 110.0 Hz, A2")
    assert json.loads((answers / "question.json").read_bytes())["slo"] == "10s"


def test_the_example_of_a_client_names_notes(cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "clients" / "notes.py"), cluster.controller, "261.63", "440"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    low, high = done.stdout.splitlines()
    assert low.startswith("261.63 Hz: 26") and "Hz, C4; ok after " in low
    assert high.startswith("440 Hz: 44") and "Hz, A4; ok after " in high


def test_the_whole_demo(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-m", "slosched", "demo", "--seconds", "6", "--out", "demo"],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    verdict = done.stdout.partition("\nverdict\n")[2]
    for words in ("21 of 21 tones", "of 449 held-out images", "  real ", "  emulated "):
        assert words in verdict, words
    folder = tmp_path / "demo"
    for name in ("models/pitch/1/model.toml", "models/digits/1/model.pt2", "real/client_log.tsv"):
        assert (folder / name).is_file(), name


def test_a_demo_that_is_interrupted_in_its_first_phase_ends_its_children(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    with subprocess.Popen(
        [sys.executable, "-m", "slosched", "demo", "--out", str(tmp_path / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            next(line for line in process.stdout if line.startswith("  digits/1"))
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "partial results are in" in stderr and "Traceback" not in stderr
    mine = str(tmp_path).encode()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mine in _bytes_of(p)]


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
