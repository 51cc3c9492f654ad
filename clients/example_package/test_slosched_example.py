"""The package's own tests, in virtual time: a policy needs no GPU and no daemon to be tested.

pip install -e . && python -m pytest
"""

from collections.abc import Iterator

import numpy as np
import pytest
from slosched_example.backend import SumsBackend

from slosched.config import SchedulerConfig, WorkerConfig
from slosched.config_file import load_profile
from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunResult
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.workloads import parse_workload


def run(policy: str, *waves: str) -> RunResult:
    """`check` holds every invariant of the scheduler at every step."""
    return simulate(
        SimSpec(
            workload=parse_workload("waves", waves),
            scheduler=SchedulerConfig(policy=policy),
            profiles=(load_profile("v100"),),
            gpus=1,
            check=True,
        )
    )


def test_every_request_is_answered_and_light_load_is_in_time() -> None:
    result = run("NEWEST", "resnet50_v2", "4", "100ms", "2s", "50ms")
    assert result.complete and result.sent == 80
    assert result.satisfaction == 1.0


def test_under_overload_some_are_in_time_where_first_come_first_served_is_late() -> None:
    waves = ("resnet50_v2", "80", "50ms", "2s", "50ms")
    assert run("NEWEST", *waves).satisfaction > run("FIFO", *waves).satisfaction + 0.1


def test_a_wrong_value_is_named() -> None:
    with pytest.raises(InvalidConfig, match="size must be within"):
        parse_workload("waves", ["resnet50_v2", "0"])


@pytest.fixture
def device() -> Iterator[SumsBackend]:
    backend = SumsBackend(WorkerConfig(device="sums"))
    yield backend
    backend.close()


def test_the_device_answers_each_request_with_its_own_sum(device: SumsBackend) -> None:
    rows = [np.full(4, value, np.float32).tobytes() for value in (1, 2)]
    device.keep_inputs(7, rows)
    first, second = device.take_outputs(7, (8, 8))
    assert np.frombuffer(first, np.float32).tolist() == [4, 4]
    assert np.frombuffer(second, np.float32).tolist() == [8, 8]
    device.keep_inputs(8, rows)
    device.drop_inputs(8)
    assert list(device.take_outputs(8, (0, 0))) == []
