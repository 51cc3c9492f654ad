"""A worker, a controller and a gateway as processes on loopback, and a worker file for gateway_models.py."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gateway_models
from slosched.experiment.children import Child, Children

LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
_WITHIN_S = 60.0
_GRPC = re.compile(r"gRPC(?: with TLS)? on \S*:(\d+)")

#: A worker's file: two inputs of fixed shape, two of any length, texts, and a large one.
MODELS = """
[models.pair]
factory = "served_models:SumAndDifference"
[models.pair.inputs.a]
shape = [2, 3]
dtype = "float32"
[models.pair.inputs.b]
shape = [2, 3]
dtype = "float32"

[models.seen]
factory = "served_models:Seen"
lengths = [4, 16]
[models.seen.inputs.ids]
shape = [-1]
dtype = "int64"
[models.seen.inputs.mask]
shape = [-1]
dtype = "int64"

[models.shouts]
factory = "served_models:Shouts"
[models.shouts.inputs.texts]
shape = [2]
dtype = "BYTES"
max_bytes = 256
[models.shouts.outputs.loud]
shape = [2]
dtype = "BYTES"
max_bytes = 256
[models.shouts.outputs.sizes]
shape = [2]
dtype = "int64"

[models.large]
factory = "served_models:Halves"
input_shape = [3, 224, 224]
"""


@dataclass(frozen=True)
class Gateway:
    """The addresses of what runs (host:port), and its processes."""

    controller: str
    http: str
    grpc: str
    worker_process: Child
    controller_process: Child
    process: Child


@contextmanager
def serving(
    folder: Path,
    *,
    worker: Sequence[str] = ("--device", "emulated"),
    controller: Sequence[str] = (),
    gateway: Sequence[str] = (),
) -> Iterator[Gateway]:
    """Start all three, with these arguments more for each; everything ends with the context."""
    with Children() as children:
        run = children.start("worker", ["worker", *worker, *LOOPBACK], folder / "worker.log")
        port = children.wait_ready(run, within_s=_WITHIN_S)
        words = ["controller", "INFER5", "--workers", f"127.0.0.1:{port}", *LOOPBACK]
        words += ["--http-port", "-1", "--log-dir", str(folder / "run"), *controller]
        decides = children.start("controller", words, folder / "controller.log")
        address = f"127.0.0.1:{children.wait_ready(decides, within_s=_WITHIN_S)}"
        words = ["gateway", "--controller", address, "--bind", "127.0.0.1"]
        words += ["--http-port", "0", "--grpc-port", "0", *gateway]
        serves = children.start("gateway", words, folder / "gateway.log")
        http = children.wait_ready(serves, within_s=_WITHIN_S)
        yield Gateway(
            controller=address,
            http=f"127.0.0.1:{http}",
            grpc=f"127.0.0.1:{grpc_port(serves)}",
            worker_process=run,
            controller_process=decides,
            process=serves,
        )


def serving_models(folder: Path) -> tuple[str, ...]:
    """Arguments of a worker on the CPU that offers MODELS; the worker finds their module beside its file."""
    shutil.copy(Path(gateway_models.__file__), folder / "served_models.py")
    config = folder / "worker.toml"
    config.write_text(MODELS, encoding="utf-8")
    return ("--device", "cpu", "--config", str(config))


def grpc_port(process: Child) -> int:
    """The ready line has both ports, and is written at once."""
    found = _GRPC.search(process.text())
    assert found is not None, process.text()
    return int(found[1])
