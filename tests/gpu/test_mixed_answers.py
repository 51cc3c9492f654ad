"""100,000 answers compared: several architectures together, under low and overloading rates.

Two workers share the GPU, each with a cache for half of the weights; batches of all classes, captured and
plain execution side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from slosched.experiment.children import Children

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[1] / "benchmarks" / "gpu" / "exact_answers.py"
WANTED = int(os.environ.get("SLOSCHED_ANSWERS", "100000"))
WITHIN_S = float(os.environ.get("SLOSCHED_ANSWERS_S", "150"))
OWN = {
    "zeros_head": "[3, 32, 32]",
    "in_place": "[3, 32, 32]",
    "counting": "[64]",
    "remembering": "[64]",
    "recurrent": "[16, 32]",
    "transformer": '[24]\ninput_dtype = "int64"',
    "branching_net": "[4]",
    "several": '[64]\noutput = "scores"',
}
#: From the zoo: convolutions, transformers, CuPy captured and not.
ZOO = (
    "resnet_tiny",
    "resnet18",
    "mobilenet_v2",
    "vit_base",
    "bert_base",
    "cupy_mlp",
    "cupy_matmul",
)
COPIES = 3
#: What no graph can hold: a branch on data, CuPy's cuBLAS, a table that is replaced for each batch size.
PLAIN = {"branching_net", "cupy_matmul", "remembering"}
_CACHE = "1600MiB"  # half of what three instances of each take
_LOADS = 3


def configuration(folder: Path) -> Path:
    parts = [
        f'[models.{name}]\nfactory = "gpu_models:{name}"\ninput_shape = {shape}\n'
        for name, shape in OWN.items()
    ]
    path = folder / "worker.toml"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, Path]]:
    """(controller's address, the worker's configuration, a folder), with two workers on one GPU."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{os.environ.get('PYTHONPATH', '')}")
    config = configuration(tmp_path)
    loopback = ("--bind", "127.0.0.1", "--port", "0")
    with Children() as children:
        workers = [
            children.start(
                f"worker {number}",
                [
                    "worker",
                    "--device",
                    "cuda:0",
                    *loopback,
                    "--config",
                    str(config),
                    "--weights-cache",
                    _CACHE,
                ],
                tmp_path / f"worker-{number}.log",
            )
            for number in range(2)
        ]
        ports = [children.wait_ready(worker, within_s=120.0) for worker in workers]
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        controller = children.start(
            "controller",
            [
                "controller",
                "INFER5",
                "--workers",
                addresses,
                *loopback,
                "--http-port",
                "-1",
                "--log-dir",
                str(tmp_path / "run"),
            ],
            tmp_path / "controller.log",
        )
        yield f"127.0.0.1:{children.wait_ready(controller, within_s=30.0)}", config, tmp_path
    for number in range(2):
        print((tmp_path / f"worker-{number}.log").read_text(encoding="utf-8")[-3000:])  # noqa: T201


def references(config: Path, folder: Path) -> Path:
    out = folder / "references.npz"
    command = [
        sys.executable,
        str(PROGRAM),
        "references",
        str(out),
        "--config",
        str(config),
        "--models",
        ",".join((*OWN, *ZOO)),
    ]
    subprocess.run(command, check=True, timeout=200)
    return out


def load(address: str, file: Path, rates: str, seed: int) -> dict[str, Any]:
    """What `_LOADS` clients found together."""
    commands = [
        [
            sys.executable,
            str(PROGRAM),
            "load",
            address,
            str(file),
            "--rates",
            rates,
            "--copies",
            str(COPIES),
            "--slo-ms",
            "250",
            "--seed",
            str(seed + number),
        ]
        for number in range(_LOADS)
    ]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    assert all(process.returncode == 0 for process in processes), said
    sys.path.insert(0, str(PROGRAM.parent))
    from exact_answers import added

    return added([json.loads(text.strip().splitlines()[-1]) for text in said])


@pytest.mark.timeout(580)
def test_no_answer_is_wrong_whatever_runs_beside_it(served: tuple[str, Path, Path]) -> None:
    address, config, folder = served
    file = references(config, folder)
    began = time.monotonic()
    total = load(address, file, "20:4,200:4,700:5", seed=1)
    print(json.dumps(total))  # noqa: T201
    seed = 100
    while total["compared"] < WANTED and time.monotonic() - began < WITHIN_S and not total["wrong"]:
        found = load(address, file, "1500:12", seed=seed)
        print(json.dumps(found))  # noqa: T201
        seed += 10
        from exact_answers import added

        total = added([total, found])
    print(json.dumps(total))  # noqa: T201
    assert total["wrong"] == 0, total["examples"]
    assert set(total["by_model"]) == {*OWN, *ZOO}
    assert any(int(batch) > 1 for batch in total["batches"])
    for log in folder.glob("worker-*.log"):
        said = log.read_text(encoding="utf-8")
        plain = {line.partition(" ")[0] for line in said.splitlines() if "plain execution" in line}
        assert plain <= PLAIN and "branching_net" in plain, said
    assert total["compared"] >= WANTED, f"only {total['compared']} within {WITHIN_S:g} s"
