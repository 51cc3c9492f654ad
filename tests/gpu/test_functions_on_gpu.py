"""Functions with gpu=True on a real GPU: processes and CUDA contexts of their own, beside the worker's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from function_rig import FunctionRig  # noqa: E402
from slosched.core.worker.interface import CallAwaits  # noqa: E402


def test_calls_compute_on_the_gpu_in_the_process_that_ran_init() -> None:
    with FunctionRig("gpu_functions", device="cuda:0") as rig:
        first = rig.call("sums", 1_000, gpu_id=0, within_s=120)
        assert not first[0].code, first[0].reason
        pid, total = first[1]
        assert total == 499_500.0
        assert rig.call("sums", 10, gpu_id=0)[1] == (pid, 45.0)
        anew = [rig.call("adds_in_place", gpu_id=0, within_s=120)[1] for _ in range(3)]
        assert anew == [1.0, 1.0, 1.0]  # reset="restore": each call gets what init made


def test_a_crash_on_the_gpu_costs_its_call_alone() -> None:
    with FunctionRig("gpu_functions", device="cuda:0") as rig:
        rig.call("sums", 10, gpu_id=0, within_s=120)
        waits = rig.begin("awaits", gpu_id=0)
        assert isinstance(rig.wait(waits.op_id, 120), CallAwaits)
        done, _ = rig.call("breaks_context", gpu_id=0, within_s=120)
        assert done.code
        assert rig.call("sums", 10, gpu_id=0, within_s=120)[1][1] == 45.0
        rig.answer(waits, 0, 3)
        assert rig.result(waits, rig.resumed(waits)) == 3
