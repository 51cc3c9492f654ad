"""An urgent model interrupts a long one on a real GPU: right answers, and stretches that add up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

from slosched.core.worker.interface import OpKind, joined
from slosched.units import NS_PER_MS

LONG = "resnet50"


@pytest.fixture(scope="module")
def bed() -> Iterator[Any]:
    """ResNet-50 prepared with --preempt: batch 64 in segments, batch 1 with a twin."""
    import gpu_preemption as preemption

    bed = preemption.Bed([LONG])
    yield bed
    bed.backend.close()


def test_a_long_class_is_in_segments_and_a_short_model_has_a_twin(bed: Any) -> None:
    program = bed.program(LONG)
    cut = program.cut_of(type(program.classes[0])(64))
    assert cut is not None and len(cut.segment_ns) > 4
    assert program.urgent is not None and program.urgent.classes == program.classes[:1]
    assert 0 < cut.boundary_ns < 2 * NS_PER_MS
    assert any("in segments" in note and "MB" in note for note in bed.notes)


def test_an_interrupted_run_reports_the_stretches_it_ran_in(bed: Any) -> None:
    alone = bed.until(bed.launch(OpKind.EXEC, LONG, batch_size=64)).span.duration_ns
    for _ in range(5):
        long = bed.launch(OpKind.EXEC, LONG, batch_size=64)
        bed.device.spin(bed.device._exec._clock() + NS_PER_MS)
        urgent = bed.launch(OpKind.EXEC, LONG, priority=1)
        ends: dict[int, Any] = {}
        while len(ends) < 2:
            for done in bed.step(bed.device._exec._clock() + NS_PER_MS // 10):
                ends[done.op_id] = done
        done, span = ends[long], ends[urgent].span
        assert len(done.segments) == 2 and joined(done.segments) == (done.span, done.pause_ns)
        first, second = done.segments
        assert first.end_ns <= span.begin_ns and span.end_ns <= second.begin_ns
        assert done.pause_ns >= span.duration_ns
        assert done.span.duration_ns == pytest.approx(alone, rel=0.1)


def test_no_answer_of_either_is_wrong(bed: Any) -> None:
    import gpu_preemption as preemption

    found = preemption.answers(bed, preemption.LONG[LONG], 1500)
    assert found["wrong"] == 0 and found["interrupted"] > 20, found
    assert found["different_answers"] > 50, found
