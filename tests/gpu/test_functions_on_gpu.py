"""Functions with gpu=True on a real GPU: processes and CUDA contexts of their own, beside the worker's."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from function_rig import FunctionRig  # noqa: E402
from slosched.core.worker.interface import CallAwaits, OpDone, OpKind  # noqa: E402


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


def test_a_host_part_ends_while_another_call_works_on_the_gpu(tmp_path: Path) -> None:
    over = tmp_path / "over"
    with FunctionRig("gpu_functions", device="cuda:0") as rig:
        for name in ("has_lane", "sums_built"):
            assert not rig.load(name, 0).code
        busy = rig.begin("has_lane", str(over), gpu_id=0)
        cold = rig.begin("sums_built", 1_000, gpu_id=0, kind=OpKind.PREPARE)
        done = rig.wait(cold.op_id, 120)
        assert isinstance(done, OpDone)
        assert not done.code, done.reason
        over.touch()
        lane_over_ns = rig.result(busy, rig.done(busy))
        _, total, built_ns = rig.result(cold, rig.resumed(cold))
        assert total == 499_500.0
        assert built_ns < lane_over_ns
