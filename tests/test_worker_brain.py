"""What the worker's brain does with actions, told as instructions: this arrives, that follows."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from slosched.codes import Code
from slosched.config import EmulationNoise
from slosched.core.worker.interface import (
    DropInputs,
    EvictPages,
    Op,
    OpDone,
    OpKind,
    PrepareModel,
    ReleaseModel,
)
from slosched.messages import (
    ClearCache,
    ClearCacheResult,
    EvictWeights,
    EvictWeightsResult,
    GetWorkerState,
    InferResult,
    LoadModelResult,
    LoadWeightsResult,
    Span,
    UnloadModel,
    UnloadModelResult,
    WorkerGoodbye,
    WorkerStateResult,
)
from worker_rig import EXEC_NS, FOREVER_NS, MS, PAGE, WEIGHTS_NS, VirtualWorker, small_profile


def test_load_model_answers_with_the_profile_of_what_it_may_run() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.load_model(copies=3, max_batch=2)
    answer = worker.answer()
    assert isinstance(answer, LoadModelResult)
    assert (answer.batch_sizes, answer.exec_ns) == ((1, 2), (2 * MS, 3 * MS))
    assert (answer.copies, answer.pages, answer.weights_bytes) == (3, 3, 3 * PAGE)
    assert (answer.input_shape, answer.output_shape) == ((3,), (2,))


def test_batches_slower_than_max_exec_are_left_out_but_never_batch_1() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.load_model(max_exec_ns=3 * MS)
    assert worker.answer().batch_sizes == (1, 2)
    worker.load_model("other", 5, max_exec_ns=1)
    assert worker.answer().batch_sizes == (1,)


def test_a_load_then_an_inference_run_one_after_the_other_to_the_nanosecond() -> None:
    worker = VirtualWorker().serving(loaded=False)
    begin = worker.now
    worker.load_weights(latest=begin)
    worker.run(WEIGHTS_NS)
    loaded = worker.answer()
    assert isinstance(loaded, LoadWeightsResult)
    assert loaded.span == Span(begin, begin + WEIGHTS_NS, WEIGHTS_NS)
    start = worker.now + 20 * MS
    worker.infer(earliest=start, latest=start, batch=2)
    worker.infer(earliest=start, batch=3)  # padded to the class of 4
    worker.run(100 * MS)
    first, second = worker.answers()
    assert isinstance(first, InferResult) and isinstance(second, InferResult)
    assert first.copy_input.begin_ns == start - 5 * MS
    assert first.exec == Span(start, start + EXEC_NS[2], EXEC_NS[2])
    assert second.exec == Span(start + EXEC_NS[2], start + EXEC_NS[2] + EXEC_NS[4], EXEC_NS[4])
    assert first.gpu_clock_mhz == 1380


def test_a_late_wake_up_of_the_host_does_not_show_in_the_timeline() -> None:
    worker = VirtualWorker().serving()
    begin = worker.now
    for _ in range(5):
        worker.infer()
    worker.run(1_000 * MS)  # one big jump instead of many small ones
    spans = [answer.exec for answer in worker.answers() if isinstance(answer, InferResult)]
    assert [span.begin_ns for span in spans] == [begin + i * EXEC_NS[1] for i in range(5)]


def test_the_queue_is_by_earliest_and_then_by_arrival() -> None:
    worker = VirtualWorker().serving()
    base = worker.now + 50 * MS
    ids = {}
    for label, earliest in (
        ("late", base + 30 * MS),
        ("a", base),
        ("b", base),
        ("early", base - 20 * MS),
    ):
        worker.infer(earliest=earliest)
        ids[worker.next_action] = label
    worker.run(300 * MS)
    results = [answer for answer in worker.answers() if isinstance(answer, InferResult)]
    assert [ids[result.action_id] for result in results] == ["early", "a", "b", "late"]
    starts = [result.exec.begin_ns - base for result in results]
    assert starts == [-20 * MS, 0, EXEC_NS[1], 30 * MS]


def test_gpus_work_beside_one_another() -> None:
    worker = VirtualWorker(gpus=2).serving(loaded=False)
    begin = worker.now
    worker.load_weights(gpu_id=0)
    worker.load_weights(gpu_id=1)
    worker.run(WEIGHTS_NS)
    assert [answer.span.begin_ns for answer in worker.answers()] == [begin, begin]  # type: ignore[union-attr]


def slow_copies(worker: VirtualWorker, kind: OpKind, duration_ns: int) -> None:
    """Make the ops of one kind on GPU 0 take longer than an emulated GPU's."""
    worker.brain.skip_empty_copies(())
    gpu = worker.devices[0]
    outcome = gpu._outcome

    def slower(op: Op, now_ns: int) -> OpDone:
        done = outcome(op, now_ns)
        if op.kind is not kind:
            return done
        return replace(done, span=Span(now_ns, now_ns + duration_ns, duration_ns))

    gpu._outcome = slower  # type: ignore[method-assign]


def test_an_input_copy_may_begin_early_and_delays_the_exec_if_it_takes_longer() -> None:
    worker = VirtualWorker().serving()
    slow_copies(worker, OpKind.COPY_INPUT, 7 * MS)
    start = worker.now + 20 * MS
    worker.infer(earliest=start)
    worker.run(50 * MS)
    answer = worker.answer()
    assert answer.copy_input == Span(start - 5 * MS, start + 2 * MS, 7 * MS)
    assert answer.exec.begin_ns == start + 2 * MS


def test_copies_and_execs_overlap_but_each_kind_runs_alone() -> None:
    worker = VirtualWorker().serving()
    slow_copies(worker, OpKind.COPY_INPUT, 1 * MS)
    begin = worker.now
    for _ in range(3):
        worker.infer()
    worker.run(50 * MS)
    answers = [answer for answer in worker.answers() if isinstance(answer, InferResult)]
    assert [a.copy_input.begin_ns - begin for a in answers] == [0, 1 * MS, 2 * MS]
    assert [a.exec.begin_ns - begin for a in answers] == [1 * MS, 3 * MS, 5 * MS]


def test_at_the_end_a_copied_input_is_cancelled_and_a_computed_output_still_sent() -> None:
    worker = VirtualWorker().serving()
    slow_copies(worker, OpKind.COPY_INPUT, 10 * MS)
    worker.infer()
    worker.run(5 * MS)
    worker.brain.shutdown(now_ns=worker.now)
    worker.stepper.step(worker.now)
    assert isinstance(worker.answer(), WorkerGoodbye)
    worker.run(5 * MS)
    assert worker.error()[0] == 1
    worker = VirtualWorker().serving()
    slow_copies(worker, OpKind.COPY_OUTPUT, 10 * MS)
    worker.infer()
    worker.infer()
    worker.run(2 * EXEC_NS[1])  # one output is being copied, the other waits for it
    worker.brain.shutdown(now_ns=worker.now)
    worker.run(30 * MS)
    goodbye, *answers = worker.answers()
    assert isinstance(goodbye, WorkerGoodbye) and len(answers) == 2
    assert all(isinstance(answer, InferResult) for answer in answers)
    assert worker.brain.idle


def test_outputs_travel_only_for_requests_that_brought_an_input() -> None:
    worker = VirtualWorker().serving()
    worker.infer(batch=2, sizes=(12, 0))
    worker.run(50 * MS)
    assert worker.answer().output_sizes == (8, 0)
    worker.infer(batch=2)
    worker.run(50 * MS)
    assert worker.answer().output_sizes == ()


def test_evict_waits_for_the_loads_before_it_and_frees_the_pages() -> None:
    worker = VirtualWorker().serving(loaded=False)
    worker.load_weights()
    assert worker.brain.free_pages(0) == 7
    worker.give(
        EvictWeights(
            worker.session,
            worker.action_id(),
            model_id=0,
            gpu_id=0,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
    )
    assert not worker.answers()
    worker.run(WEIGHTS_NS)
    loaded, evicted = worker.answers()
    assert isinstance(loaded, LoadWeightsResult) and isinstance(evicted, EvictWeightsResult)
    assert evicted.span.begin_ns == loaded.span.end_ns
    assert worker.brain.free_pages(0) == 10
    assert EvictPages(0, 0) in worker.effects


def test_a_reload_takes_no_second_set_of_pages() -> None:
    worker = VirtualWorker().serving()
    worker.load_weights()
    assert worker.brain.free_pages(0) == 7
    worker.run(WEIGHTS_NS)
    assert isinstance(worker.answer(), LoadWeightsResult)
    assert worker.brain.free_pages(0) == 7


def test_clear_cache_keeps_what_is_in_use() -> None:
    worker = VirtualWorker().serving()
    worker.load_weights(1)
    worker.run(WEIGHTS_NS)
    worker.answers()
    worker.infer(0)
    worker.give(ClearCache(worker.session, worker.action_id()))
    assert isinstance(worker.answer(), ClearCacheResult)
    assert worker.brain.gpu_reports()[0].resident == (0,)
    worker.run(50 * MS)
    assert isinstance(worker.answer(), InferResult)


def test_a_model_whose_process_ends_loses_its_weights_and_nothing_else() -> None:
    worker = VirtualWorker().serving()
    worker.load_model("other", model_id=7)
    for model_id in (1, 7):
        worker.load_weights(model_id)
        worker.run(WEIGHTS_NS)
    worker.answers()
    worker.devices[0].ending = 1.0
    worker.infer(0)
    worker.infer(7, earliest=worker.now + 100 * MS)
    worker.run(50 * MS)
    assert worker.error()[0] == Code.MODEL_PROCESS_ENDED
    assert worker.brain.gpu_reports()[0].resident == (7,)  # both instances of its name are gone
    assert worker.brain.free_pages(0) == 7
    worker.devices[0].ending = 0.0
    worker.infer(1)
    assert worker.error()[0] == Code.EXEC_WEIGHTS_MISSING
    worker.load_weights(0)
    worker.run(WEIGHTS_NS)
    worker.infer(0)
    worker.run(200 * MS)
    kinds = [type(answer) for answer in worker.answers()]
    assert kinds == [LoadWeightsResult, InferResult, InferResult]


def test_worker_state_says_what_is_where() -> None:
    worker = VirtualWorker(gpus=2).serving()
    worker.give(GetWorkerState(worker.session, worker.action_id()))
    answer = worker.answer()
    assert isinstance(answer, WorkerStateResult)
    assert [gpu.resident for gpu in answer.gpus] == [(0,), ()]
    assert answer.models == ((0, "net"), (1, "net"))


def test_unload_frees_everything_and_the_last_copy_its_host_memory() -> None:
    worker = VirtualWorker().serving()
    for model_id in (0, 1):
        worker.give(UnloadModel(worker.session, worker.action_id(), model_id))
        assert isinstance(worker.answer(), UnloadModelResult)
    assert worker.brain.free_pages(0) == 10
    released = [effect for effect in worker.effects if isinstance(effect, ReleaseModel)]
    assert released == [ReleaseModel(0, "net", last=False), ReleaseModel(1, "net", last=True)]


def test_loading_known_instances_again_answers_at_once() -> None:
    worker = VirtualWorker().serving()
    worker.load_model(copies=2)
    assert worker.answer().exec_ns == tuple(EXEC_NS.values())
    assert sum(isinstance(effect, PrepareModel) for effect in worker.effects) == 1
    assert worker.brain.gpu_reports()[0].resident == (0,)  # its weights stay


def test_an_alias_loads_the_model_it_stands_for() -> None:
    profile = small_profile()
    profile.models["resnet50"] = profile.models["net"]
    worker = VirtualWorker(profile=profile)
    worker.hello()
    worker.load_model("resnet50_v2")
    assert isinstance(worker.answer(), LoadModelResult)


def test_a_model_waits_for_its_earliest() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.load_model(earliest_ns=worker.now + 30 * MS)
    worker.run(29 * MS)
    assert not worker.answers()
    worker.run(1 * MS)
    assert isinstance(worker.answer(), LoadModelResult)


def test_noise_is_drawn_from_the_seed_per_gpu() -> None:
    def durations(seed: int, gpu_id: int) -> list[int]:
        noise = EmulationNoise(seed=seed, exec_sigma=0.05, stall_probability=0.1, stall_ns=50 * MS)
        worker = VirtualWorker(gpus=2, noise=noise).serving(loaded=False)
        worker.load_weights(gpu_id=gpu_id)
        worker.run(WEIGHTS_NS)
        worker.answers()
        for _ in range(50):
            worker.infer(gpu_id=gpu_id)
        worker.run(10_000 * MS)
        return [
            answer.exec.duration_ns
            for answer in worker.answers()
            if isinstance(answer, InferResult)
        ]

    first = durations(1, 0)
    assert len(first) == 50 and first == durations(1, 0)
    assert first != durations(2, 0) and first != durations(1, 1)
    calm = [ns for ns in first if ns < 50 * MS]
    assert len(calm) < 50, "a stall now and then"
    assert all(abs(ns - EXEC_NS[1]) <= 0.15 * EXEC_NS[1] + 1 for ns in calm)
    assert sum(calm) / len(calm) == pytest.approx(EXEC_NS[1], rel=0.03)


def test_an_inference_that_ends_before_it_runs_drops_its_inputs() -> None:
    worker = VirtualWorker().serving(loaded=False)
    key = worker.infer(sizes=(12,), earliest=worker.now + 50 * MS)
    assert key is not None
    worker.run(60 * MS)
    assert worker.error()[0] == 82
    assert DropInputs(key) in worker.effects
