"""Whatever a controller sends: pages are exact, execs never overlap, every action is answered once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from slosched.config import EmulationNoise
from slosched.messages import (
    ClearCache,
    EvictWeights,
    Infer,
    InferResult,
    LoadModel,
    LoadWeights,
    UnloadModel,
    WorkerGoodbye,
)
from worker_rig import FOREVER_NS, MS, VirtualWorker, small_profile

IDS = st.integers(0, 4)
GPUS = st.integers(0, 2)  # 2 is not there
STEPS = st.one_of(
    st.tuples(st.just("load"), IDS, GPUS, st.integers(-5, 40), st.integers(-2, 40)),
    st.tuples(st.just("evict"), IDS, GPUS, st.integers(-5, 20), st.integers(-2, 40)),
    st.tuples(st.just("infer"), IDS, GPUS, st.integers(-5, 40), st.integers(-2, 40)),
    st.tuples(st.just("unload"), IDS, GPUS, st.just(0), st.just(0)),
    st.tuples(st.just("model"), IDS, GPUS, st.integers(-5, 20), st.integers(-2, 40)),
    st.tuples(st.just("clear"), IDS, GPUS, st.just(0), st.just(0)),
    st.tuples(st.just("wait"), IDS, GPUS, st.integers(0, 30), st.just(0)),
)
PROFILE = small_profile(pages=8, model_pages=3)


def send(worker: VirtualWorker, kind: str, model: int, gpu: int, ahead: int, window: int) -> None:
    action, session = worker.action_id(), worker.session
    earliest = worker.now + ahead * MS
    latest = FOREVER_NS if window == 40 else earliest + window * MS
    if kind == "load":
        worker.give(
            LoadWeights(
                session,
                action,
                model_id=model,
                gpu_id=gpu,
                earliest_ns=earliest,
                latest_ns=latest,
                expected_duration_ns=0,
            )
        )
    elif kind == "evict":
        worker.give(
            EvictWeights(
                session, action, model_id=model, gpu_id=gpu, earliest_ns=earliest, latest_ns=latest
            )
        )
    elif kind == "infer":
        batch = 1 + window % 5  # 5 is larger than every class
        sizes = (12,) * batch if ahead % 2 else ()
        message = Infer(
            session,
            action,
            model_id=model,
            gpu_id=gpu,
            earliest_ns=earliest,
            latest_ns=latest,
            expected_duration_ns=0,
            batch_size=batch,
            request_count=batch,
            input_sizes=sizes,
        )
        worker.give(message, *sizes)
    elif kind == "unload":
        worker.give(UnloadModel(session, action, model))
    elif kind == "model":
        name = ("net", "other", "none")[window % 3]
        worker.give(
            LoadModel(
                session,
                action,
                name=name,
                model_id=model,
                copies=2,
                max_batch=16,
                max_exec_ns=10**9,
                earliest_ns=earliest,
                latest_ns=latest,
            )
        )
    else:
        worker.give(ClearCache(session, action))


def check_pages(worker: VirtualWorker) -> None:
    for gpu in worker.brain.gpu_reports():
        held = 3 * len(gpu.resident)
        assert worker.brain.free_pages(gpu.gpu_id) == gpu.pages - held >= 0


def check_lane(spans: list[Any], what: str) -> None:
    spans.sort(key=lambda span: (span.begin_ns, span.end_ns))
    for earlier, later in pairwise(spans):
        assert earlier.end_ns <= later.begin_ns, f"{what} overlap: {earlier} and {later}"


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=40), st.integers(0, 3))
def test_any_instructions(steps: list[tuple[str, int, int, int, int]], seed: int) -> None:
    noise = EmulationNoise(seed=seed, exec_sigma=0.1, stall_probability=0.1, stall_ns=30 * MS)
    worker = VirtualWorker(gpus=2, profile=PROFILE, noise=noise).serving()
    for step in steps:
        if step[0] == "wait":
            worker.run(step[3] * MS)
        else:
            send(worker, *step)
        check_pages(worker)
    worker.run(10_000 * MS)
    check_pages(worker)
    assert worker.brain.idle
    answers = worker.answers()
    counted = Counter(answer.action_id for answer in answers)  # type: ignore[union-attr]
    first = 3  # before that `serving` asked
    assert counted == dict.fromkeys(range(first, worker.next_action + 1), 1)
    for gpu_id in (0, 1):
        results = [a for a in answers if isinstance(a, InferResult) and a.gpu_id == gpu_id]
        check_lane([a.exec for a in results], f"execs of GPU {gpu_id}")


@settings(max_examples=50, deadline=None)
@given(st.lists(STEPS, max_size=30), st.integers(0, 60))
def test_any_instructions_and_then_an_end(
    steps: list[tuple[str, int, int, int, int]], after: int
) -> None:
    worker = VirtualWorker(gpus=2, profile=PROFILE).serving()
    for step in steps:
        if step[0] == "wait":
            worker.run(step[3] * MS)
        else:
            send(worker, *step)
    worker.run(after * MS)
    worker.brain.shutdown(now_ns=worker.now)
    worker.stepper.step(worker.now)
    worker.run(2_000 * MS)
    assert worker.brain.idle
    answers = [each for each in worker.answers() if not isinstance(each, WorkerGoodbye)]
    counted = Counter(answer.action_id for answer in answers)  # type: ignore[union-attr]
    assert counted == dict.fromkeys(range(3, worker.next_action + 1), 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(STEPS, max_size=30), st.integers(1, 7))
def test_the_same_instructions_give_the_same_answers_however_time_is_cut(
    steps: list[tuple[str, int, int, int, int]], slice_ms: int
) -> None:
    def answers(slice_ms: int | None) -> list[Any]:
        worker = VirtualWorker(gpus=2, profile=PROFILE).serving()
        for step in steps:
            if step[0] != "wait":
                send(worker, *step)
            elif slice_ms is None:
                worker.run(step[3] * MS)
            else:
                whole, rest = divmod(step[3], slice_ms)
                for _ in range(whole):
                    worker.run(slice_ms * MS)
                worker.run(rest * MS)
        worker.run(1_000 * MS)
        return list(worker.answers())

    assert answers(slice_ms) == answers(None)
