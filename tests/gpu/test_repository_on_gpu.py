"""A repository on a real GPU, where all models share one process: versions come, change and do not meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from repository_rig import Repository  # noqa: E402
from slosched import Client  # noqa: E402
from slosched.clients.inference import Model  # noqa: E402
from slosched.errors import RequestFailed  # noqa: E402
from slosched.experiment.children import Children  # noqa: E402

ROW = np.arange(4, dtype=np.float32)


def soon(is_so: Callable[[], bool], what: str, *, within_s: float = 60.0) -> None:
    ends = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


def times(client: Client, model: Model, factor: float) -> bool:
    output = client.infer(model, ROW, slo="10s").output
    return output is not None and np.array_equal(output, ROW * factor)


def test_versions_are_served_come_and_change(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.scaled("double/1", 2.0)
    place = repository.scaled("triple/1", 3.0)
    repository.add("broken/1", {"model.pt2": b"nonsense"})
    linear = torch.nn.Linear(4, 2).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(linear, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    repository.add("linear/1", {"model.pt2": (tmp_path / "model.pt2").read_bytes()})
    common = ["--bind", "127.0.0.1", "--port", "0"]
    with Children(stop_within_s=5.0) as children:
        more = ["--http-port", "-1", "--log-dir", str(tmp_path / "run")]
        controller = children.start(
            "controller", ["controller", "INFER5", *more, *common], tmp_path / "controller.log"
        )
        address = f"127.0.0.1:{children.wait_ready(controller, within_s=60)}"
        more = ["--device", "cuda:0", "--repository", str(repository.path)]
        log = tmp_path / "worker.log"
        arguments = ["worker", *more, "--controller", address, *common]
        children.wait_ready(children.start("worker", arguments, log), within_s=240)
        with Client(address, timeout_s=30) as client:
            soon(lambda: "double:1" in client.models()[1], "the worker did not register")
            [double], [triple] = client.load("double"), client.load("triple")
            assert times(client, double, 2) and times(client, triple, 3)
            [line] = client.load("linear")
            with torch.no_grad():
                expected = linear(torch.from_numpy(ROW)[None])[0].numpy()
            output = client.infer(line, ROW, slo="10s").output
            assert output is not None and np.allclose(output, expected, atol=1e-3)
            with pytest.raises(
                RequestFailed, match=r"broken:1.*model\.pt2 is not a whole ZIP file"
            ):
                client.load("broken")
            repository.scaled("double/2", 20.0)
            soon(lambda: "double:2" in client.models()[1], "a version was not noticed")
            [newer] = client.load("double")
            assert times(client, newer, 20) and times(client, double, 2)
            (place / "scale.py").write_text("FACTOR = 7.0\n")
            soon(lambda: "triple:1: changed" in log.read_text(), "a change was not noticed")
            assert times(client, client.load("triple", copies=2)[1], 3)
            client.unload("triple")
            soon(
                lambda: "triple:1" not in [m.name for m in client.models()[0]],
                "it was not unloaded",
            )
            assert times(client, client.load("triple")[0], 7)
            repository.remove("double/2")
            soon(lambda: "double:2" not in client.models()[1], "its end was not noticed")
            assert times(client, newer, 20)
