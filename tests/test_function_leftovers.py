"""What a call leaves in its process harms no later one; an init that ends its process says how."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from function_rig import FunctionRig
from slosched.codes import Code

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def rig() -> Iterator[FunctionRig]:
    with FunctionRig("leftover_functions") as rig:
        yield rig


@pytest.mark.parametrize("name", ["leaves_timer", "leaves_raw_thread"])
def test_a_process_with_something_left_running_is_not_used_again(
    rig: FunctionRig, name: str
) -> None:
    pids = [rig.call(name)[1] for _ in range(8)]
    assert len(set(pids)) == 8


def test_a_stream_that_exits_costs_no_answer(rig: FunctionRig) -> None:
    done, pid = rig.call("replaces_stdout")
    assert (done.code, pid > 0) == (0, True), done.reason


def test_a_keyboard_interrupt_of_a_call_is_its_end_and_no_error_of_ours(rig: FunctionRig) -> None:
    done, _ = rig.call("interrupts")
    assert done.code == Code.MODEL_PROCESS_ENDED
    assert "exit code 130" in done.reason


@pytest.mark.parametrize(
    ("name", "words"), [("init_exits", "exit code 1"), ("init_dies", "exit code 4")]
)
def test_an_init_that_ends_its_process_says_how(rig: FunctionRig, name: str, words: str) -> None:
    prepared = rig.prepare(name)
    assert prepared.code == Code.INVALID_MODEL_PATH
    assert f"while its module was imported or its init ran ({words})" in prepared.reason
