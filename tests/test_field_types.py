"""Configs that a program builds: a value of a wrong type is named at once, whatever the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slosched import config as config_module
from slosched.daemon import worker as worker_module
from slosched.errors import InvalidConfig
from slosched.sim import network as network_module
from slosched.sim import spec as spec_module

# Without their types: that wrong ones are found is the question.
config: Any = config_module
daemon: Any = worker_module
network: Any = network_module
sim: Any = spec_module
_DEFAULT, _WORKERS = config.SchedulerConfig(), ("127.0.0.1:12345",)
_MODEL = config.ModelProfile("m", {1: 1_000_000}, 1, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: config.ControllerConfig(_DEFAULT, _WORKERS, port="80"),
            "port must be a whole number, not '8",
        ),
        (
            lambda: config.ControllerConfig(_DEFAULT, _WORKERS, port=True),
            "port must be a whole number, not T",
        ),
        (
            lambda: config.ControllerConfig(_DEFAULT, _WORKERS, port=70_000),
            "port must be within 0..65535",
        ),
        (
            lambda: config.ControllerConfig(_DEFAULT, _WORKERS, http_port=-2),
            "http_port must be within -1",
        ),
        (lambda: config.ControllerConfig(_DEFAULT, "a:1"), "workers must be a tuple, not 'a:1'"),
        (
            lambda: config.ControllerConfig(_DEFAULT, ("a:1", 5)),
            r"workers\[1\] must be a text, not 5",
        ),
        (lambda: config.ControllerConfig(_DEFAULT, ("nonsense",)), "'nonsense' is not a host:port"),
        (lambda: config.ControllerConfig(_DEFAULT, _WORKERS, bind="a b"), "cannot listen on 'a b'"),
        (
            lambda: config.ControllerConfig({"policy": "FIFO"}, _WORKERS),
            "must be a SchedulerConfig, not {",
        ),
        (
            lambda: config.ControllerConfig(None, _WORKERS),
            "scheduler must be a SchedulerConfig, not None",
        ),
        (
            lambda: config.SchedulerConfig(schedule_ahead_ns="5ms"),
            "schedule_ahead_ns must be a whole number",
        ),
        (
            lambda: config.SchedulerConfig(schedule_ahead_ns=5e6),
            "must be a whole number, not 5000000.0",
        ),
        (
            lambda: config.SchedulerConfig(max_client_weight=float("nan")),
            "must be a number, not NaN",
        ),
        (lambda: config.SchedulerConfig(weights="a=1"), "weights must be a tuple"),
        (
            lambda: config.SchedulerConfig(weights=("a=1",)),
            r"weights\[0\] must be a WeightRule, not 'a=1'",
        ),
        (lambda: config.WeightRule("2", client="a"), "weight must be a number, not '2'"),
        (lambda: config.WorkerConfig(gpus=2.0), "gpus must be a whole number, not 2.0"),
        (
            lambda: config.WorkerConfig(channels_last="no"),
            "channels_last must be True or False, not 'no'",
        ),
        (lambda: config.WorkerConfig(noise={}), "noise must be an EmulationNoise, not {}"),
        (
            lambda: config.WorkerConfig(models=({"name": "m"},)),
            r"models\[0\] must be a ModelSource",
        ),
        (lambda: config.WorkerConfig(put_aside=(("a",),)), r"put_aside\[0\] must be a tuple of 2"),
        (lambda: config.WorkerConfig(bind=5), "bind must be a text, not 5"),
        (lambda: config.ModelSource("m", input_shape=3), "input_shape must be a tuple, not 3"),
        (
            lambda: config.ModelProfile("m", {"1": 1}, 1, 1),
            "a key of exec_ns must be a whole number, not '1'",
        ),
        (
            lambda: config.ModelProfile("m", {1: 2.5}, 1, 1),
            r"exec_ns\[1\] must be a whole number, not 2.5",
        ),
        (lambda: config.GpuProfile("g", [_MODEL], 2**30), "models must be a dict"),
        (lambda: config.EmulationNoise(exec_sigma="0.1"), "exec_sigma must be a number, not '0.1'"),
        (lambda: network.Network(jitter_ns=0.5), "jitter_ns must be a whole number, not 0.5"),
        (lambda: sim.WorkerClocks(drift_ppm=None), "drift_ppm must be a number, not None"),
        (lambda: sim.SimSpec("fig7", _DEFAULT, ()), "workload must be a Workload, not 'fig7'"),
        (lambda: daemon.WorkerServer({"gpus": 1}), "config must be a WorkerConfig, not {"),
    ],
)
def test_a_wrong_type_is_named_at_once(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        make()


def test_what_means_the_same_is_taken() -> None:
    made = config.ControllerConfig(_DEFAULT, ["127.0.0.1:12345"], log_dir=Path("runs"))
    assert made == config.ControllerConfig(_DEFAULT, _WORKERS, log_dir="runs")
    assert hash(made.workers) and isinstance(made.log_dir, str)
    assert config.SchedulerConfig(max_client_weight=2).max_client_weight == 2
    worker = config.WorkerConfig(models=[config.ModelSource("m", input_shape=[3, 4])])
    assert worker.models[0].input_shape == (3, 4)
    assert config.ModelSource("m").input_shape == ()
