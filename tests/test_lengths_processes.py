"""Requests of any length through real processes: a load runs what it draws, and answers are right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cpu_models
from slosched import Client
from slosched.codes import ActionType
from slosched.config_file import write_profile
from slosched.experiment.children import Children
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.signature import Tensor
from slosched.telemetry.action_log import FILE_NAME, read_action_log
from slosched.units import NS_PER_MS
from slosched.workloads.lengths import Lengths

pytestmark = pytest.mark.processes

LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
TOKENS = (Tensor("ids", "int64", (-1,)), Tensor("mask", "int64", (-1,)))
#: An exec takes as many ms as its class is long, so that the action log says which class ran.
CLASSES = (2, 4, 8)
LENGTHS = Lengths(median=3, sigma=0.6, least=1, most=8)


def start(children: Children, folder: Path, *worker: str) -> str:
    """The address of a controller over one worker."""
    serving = children.start("worker", ["worker", *worker, *LOOPBACK], folder / "worker.log")
    port = children.wait_ready(serving, within_s=60)
    words = ["controller", "INFER5", "--workers", f"127.0.0.1:{port}", *LOOPBACK]
    words += ["--http-port", "-1", "--log-dir", str(folder / "run"), "--no-mix-lengths"]
    controller = children.start("controller", words, folder / "controller.log")
    return f"127.0.0.1:{children.wait_ready(controller, within_s=30)}"


def test_a_load_runs_each_request_in_the_class_of_its_length(tmp_path: Path) -> None:
    times = {length: {1: length * NS_PER_MS} for length in CLASSES}
    model = ModelProfile(
        "net",
        times[8],
        NS_PER_MS,
        2**24,
        inputs=TOKENS,
        outputs=(Tensor("hidden", "float32", (-1, 2)),),
        exec_ns_at=times,
    )
    profile = tmp_path / "profile.toml"
    write_profile(profile, GpuProfile("small", {"net": model}, 2**28), replacing=False)
    with Children() as children:
        address = start(children, tmp_path, "--device", "emulated", "--profile", str(profile))
        entry = f"net:1:60:2s::{LENGTHS.text}"
        words = [sys.executable, "-m", "slosched", "client", address, "mix", entry, "3s", "--json"]
        done = subprocess.run(
            [*words, "--out", str(tmp_path / "client")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    (step,) = json.loads(done.stdout)["steps"]
    log = read_action_log(tmp_path / "run" / FILE_NAME)
    execs = log["worker_exec_duration"][log["action_type"] == ActionType.INFER] // NS_PER_MS
    ran = {length: int((execs == length).sum()) for length in CLASSES}
    drawn = dict.fromkeys(CLASSES, 0)
    draws = LENGTHS.draws(0)
    for _ in range(step["sent"]):
        length = next(draws)
        drawn[next(each for each in CLASSES if each >= length)] += 1
    assert step["codes"] == {"ok": step["sent"]} and step["sent"] > 100
    assert ran == drawn


def test_answers_to_named_inputs_are_those_of_the_model_at_their_own_length(tmp_path: Path) -> None:
    # The worker finds the module beside its file.
    shutil.copy(Path(cpu_models.__file__), tmp_path / "pooled_models.py")
    config = tmp_path / "worker.toml"
    config.write_text(
        "[models.pooled]\nfactory = 'pooled_models:Pooled'\nlengths = [4, 16]\n"
        "[models.pooled.inputs.ids]\nshape = [-1]\ndtype = 'int64'\n"
        "[models.pooled.inputs.mask]\nshape = [-1]\ndtype = 'int64'\n",
        encoding="utf-8",
    )
    direct = cpu_models.Pooled().eval()
    generator = np.random.default_rng(1)
    with Children() as children:
        address = start(children, tmp_path, "--device", "cpu", "--config", str(config))
        with Client(address) as client:
            (model,) = client.load("pooled")
            for length in (1, 3, 4, 5, 16):
                ids = generator.integers(0, 900, length)
                mask = np.ones(length, np.int64)
                answer = client.infer(model, {"ids": ids, "mask": mask}, slo="5s")
                with torch.inference_mode():
                    wanted = direct(torch.from_numpy(ids)[None], torch.from_numpy(mask)[None])
                assert answer.ok, answer.reason
                assert answer.outputs.keys() == wanted.keys()
                for name, tensor in wanted.items():
                    assert np.allclose(answer.outputs[name], tensor[0].numpy(), atol=1e-5), name
