"""Length classes: which queue a request waits in, what runs together, and what is refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from scheduler_rig import MS, T0, Rig
from slosched.bound.problem import Cluster, cells_of
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.joint_batches import joint_batch
from slosched.core.scheduler.state import Client, Gpu, Instance, Request
from slosched.core.values import Value
from slosched.core.worker.kinds.infer import infer_fault
from slosched.core.worker.state import Instance as WorkerInstance
from slosched.errors import InvalidConfig
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.messages import (
    Infer,
    InferReply,
    InferRequest,
    LengthClass,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    Span,
)
from slosched.signature import BYTES, Tensor, described, digest, row_bytes
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_S
from slosched.workloads import parse_workload
from slosched.workloads.composed import Composed
from slosched.workloads.lengths import Lengths, read_lengths
from slosched.workloads.mix import MixEntry, mix
from slosched.workloads.mix_file import load_mix

INPUTS = (Tensor("ids", "int64", (-1,)), Tensor("mask", "int8", (-1,)))
OUTPUTS = (Tensor("hidden", "float32", (-1, 4)),)
#: Exec times in ms, by length class and batch.
TIMES = {8: {1: 2.0, 2: 2.2, 4: 2.6}, 16: {1: 2.5, 2: 3.0, 4: 4.0}, 32: {1: 3.0, 2: 4.0, 4: 6.0}}


def prepared(
    rig: Rig,
    *,
    worker_id: int = 0,
    session: int = 50,
    times: dict[int, dict[int, float]] = TIMES,
    inputs: tuple[Tensor, ...] = INPUTS,
) -> None:
    """Answer every LoadModel that waits at the worker."""
    classes = tuple(
        LengthClass(length, tuple(each), tuple(round(ms * MS) for ms in each.values()))
        for length, each in times.items()
    )
    for action in rig.to_worker(LoadModel, worker_id):
        if action.session != session:
            continue
        rig.from_worker(
            LoadModelResult(
                session=session,
                action_id=action.action_id,
                span=Span(0, 0, 0),
                copies=action.copies,
                batch_sizes=classes[-1].batch_sizes,
                exec_ns=classes[-1].exec_ns,
                weights_ns=8 * MS,
                weights_bytes=2**24,
                pages=1,
                input_shape=(),
                input_dtype="int64",
                output_shape=(),
                output_dtype="float32",
                random_weights=False,
                received_ns=rig.now_ns,
                sent_ns=rig.now_ns,
                inputs=inputs,
                outputs=OUTPUTS,
                length_classes=classes,
            ),
            worker_id,
        )
    rig.step()


def ready(config: SchedulerConfig | None = None) -> Rig:
    rig = Rig(config)
    rig.hello()
    rig.join()
    rig.handle(FromClient(b"c", LoadModelRequest(900, "net", 1)))
    rig.steps()
    prepared(rig)
    rig.steps()
    rig.weights_loaded()
    rig.steps()
    return rig


def instance(rig: Rig) -> Instance:
    return rig.scheduler.cluster.models[0]


def ask(
    rig: Rig,
    request_id: int,
    length: int,
    *,
    slo_ms: float = 100,
    input_bytes: int = 0,
    signature: int = 0,
) -> None:
    message = InferRequest(
        request_id=request_id,
        model_id=0,
        slo_ns=round(slo_ms * MS),
        length=length,
        signature=signature,
    )
    value = Value(1000 + request_id, input_bytes) if input_bytes else None
    rig.handle(FromClient(b"c", message, value))


def test_each_class_is_a_queue_and_the_longest_bears_the_models_name() -> None:
    rig = ready()
    model = instance(rig)
    assert [(queue.program, queue.length) for queue in model.queues] == [
        ("net", 32),
        ("net@8", 8),
        ("net@16", 16),
    ]
    lengths = {length: model.queue_for(length).length for length in (1, 8, 9, 16, 17, 32, 0)}
    assert lengths == {1: 8, 8: 8, 9: 16, 16: 16, 17: 32, 32: 32, 0: 32}
    (reply,) = rig.to_client(LoadModelReply)
    info = reply.models[0]
    assert (info.inputs, info.outputs, info.lengths) == (INPUTS, OUTPUTS, (8, 16, 32))
    assert info.b1_ns == 3 * MS


@pytest.mark.parametrize(("length", "runs_at"), [(5, 8), (8, 8), (9, 16), (20, 32)])
def test_a_request_runs_in_the_shortest_class_that_takes_it(length: int, runs_at: int) -> None:
    rig = ready()
    ask(rig, 1, length)
    rig.step()
    (infer,) = rig.to_worker(Infer)
    assert (infer.length, infer.lengths) == (runs_at, (length,))
    assert infer.expected_duration_ns == round(TIMES[runs_at][1] * MS)


def test_inputs_of_several_tensors_travel_as_one_frame() -> None:
    rig = ready()
    size = row_bytes(INPUTS, 5)
    ask(rig, 1, 5, input_bytes=size, signature=digest(INPUTS))
    rig.step()
    assert rig.to_worker(Infer)[-1].input_sizes == (size,)


def test_inputs_that_are_made_up_have_the_length_of_the_request() -> None:
    rig = ready(SchedulerConfig(generate_inputs=True))
    ask(rig, 1, 5)
    rig.step()
    assert rig.to_worker(Infer)[-1].input_sizes == (row_bytes(INPUTS, 5),)


@pytest.mark.parametrize(
    ("length", "input_bytes", "signature", "words"),
    [
        (33, 0, 0, "not a length of 33"),
        (-1, 0, 0, "not a length of -1"),
        (5, 40, digest(INPUTS[:1]), "brings other inputs"),
        (5, 41, digest(INPUTS), "have 41 bytes"),
        (0, 40, digest(INPUTS), "needs its length"),
    ],
)
def test_inputs_of_another_signature_are_refused_with_the_models_own(
    length: int, input_bytes: int, signature: int, words: str
) -> None:
    rig = ready()
    ask(rig, 1, length, input_bytes=input_bytes, signature=signature)
    rig.step()
    (reply,) = rig.to_client(InferReply)
    assert reply.code == Code.INVALID_REQUEST
    assert words in reply.reason and described(INPUTS) in reply.reason


def test_a_published_policy_pads_to_the_longest() -> None:
    rig = ready(SchedulerConfig(fidelity="paper"))
    ask(rig, 1, 5, slo_ms=200)
    (request,) = instance(rig).queue.requests
    assert (request.queue.length, request.length) == (32, 5)


@pytest.mark.parametrize("times", [{8: TIMES[8]}, {4: TIMES[8], 8: TIMES[16], 64: TIMES[32]}])
def test_when_the_length_classes_change_no_request_is_left_in_an_old_queue(
    times: dict[int, dict[int, float]],
) -> None:
    rig = ready()
    for request_id in range(1, 20):
        ask(rig, request_id, 1 + request_id)
    rig.step()
    for worker_session in (60,):
        rig.join(session=worker_session)
        rig.steps()
        prepared(rig, session=worker_session, times=times)
    rig.steps()
    assert instance(rig).lengths == tuple(times)
    replies = {reply.request_id: reply.code for reply in rig.to_client(InferReply)}
    assert set(replies) >= set(range(3, 20)), "what waited in the old queues is answered"
    rig.weights_loaded()
    ask(rig, 100, 4)
    rig.step()
    assert rig.to_worker(Infer)[-1].length == next(each for each in times if each >= 4)
    rig.checker.recount()


def test_bytes_may_be_fewer_than_the_most() -> None:
    text = (Tensor("text", BYTES, (1,), 100),)
    rig = Rig()
    rig.hello()
    rig.join()
    rig.handle(FromClient(b"c", LoadModelRequest(900, "net", 1)))
    rig.steps()
    for action in rig.to_worker(LoadModel, 0):
        rig.from_worker(
            LoadModelResult(
                session=50,
                action_id=action.action_id,
                span=Span(0, 0, 0),
                copies=1,
                batch_sizes=(1,),
                exec_ns=(MS,),
                weights_ns=MS,
                weights_bytes=1,
                pages=1,
                input_shape=(1,),
                input_dtype=BYTES,
                output_shape=(2,),
                output_dtype="float32",
                random_weights=False,
                received_ns=rig.now_ns,
                sent_ns=rig.now_ns,
                inputs=text,
            )
        )
    rig.steps()
    rig.weights_loaded()
    for request_id, size, code in ((1, 100, None), (2, 5, None), (3, 101, Code.INVALID_REQUEST)):
        ask(rig, request_id, 0, input_bytes=size, signature=digest(text))
        rig.step()
        codes = [r.code for r in rig.to_client(InferReply) if r.request_id == request_id]
        assert codes == ([] if code is None else [code])


# ------------------------------------------------------------------------------- joint batches


def waiting(rig: Rig, lengths: list[int], slo_ms: float = 100) -> tuple[Gpu, list[Request]]:
    """The GPU, and requests of these lengths that wait in their queues."""
    (gpu,) = rig.scheduler.cluster.gpus.values()
    client = Client(b"c", 1, "c")
    model, found = instance(rig), []
    for key, length in enumerate(lengths):
        request = Request(
            key=key,
            client=client,
            request_id=key,
            user_id=0,
            queue=model.queue_for(length),
            slo_factor=0.0,
            slo_ns=round(slo_ms * MS),
            arrival_ns=T0,
            length=length,
        )
        request.queue.requests.append(request)
        found.append(request)
    return gpu, found


def test_free_rows_of_a_longer_batch_take_shorter_requests() -> None:
    rig = ready()
    gpu, requests = waiting(rig, [30, 30, 30, 5])
    queue = requests[0].queue
    aboard, queue.requests[:] = requests[:3], []
    joint = joint_batch(gpu, queue, aboard, 4, T0, ())
    assert (joint.queue, joint.batch) == (queue, 4)
    assert joint.riders == ((requests[3].queue, 0, 1),)


def test_a_short_batch_runs_at_the_longer_length_where_that_is_cheaper_than_two() -> None:
    rig = ready()
    gpu, requests = waiting(rig, [5, 30])
    queue = requests[0].queue
    queue.requests[:] = []
    joint = joint_batch(gpu, queue, requests[:1], 1, T0, ())
    # 4 ms for both at length 32 instead of 2 + 3 ms.
    assert (joint.queue.length, joint.batch, joint.expected_ns) == (32, 2, 4 * MS)


def test_nothing_joins_that_would_be_late_or_make_others_late() -> None:
    rig = ready()
    gpu, requests = waiting(rig, [5, 30], slo_ms=4)
    queue = requests[0].queue
    queue.requests[:] = []
    assert joint_batch(gpu, queue, requests[:1], 1, T0, ()).riders == ()


@pytest.mark.parametrize("seed", range(60))
def test_a_joint_batch_fits_is_in_time_and_costs_less_than_batches_apart(seed: int) -> None:
    draw = Random(seed)
    rig = ready()
    gpu, requests = waiting(
        rig, [draw.choice((4, 12, 30)) for _ in range(draw.randint(2, 14))], draw.choice((5, 9, 40))
    )
    for request in requests:
        request.due_ns += draw.randrange(4 * MS)
    for queue in instance(rig).queues:
        queue.requests.sort()
    queue = draw.choice(requests).queue
    table = gpu.tables[queue.program]
    count = min(len(queue.requests), draw.choice((1, 2, 4)))
    aboard = queue.requests[:count]
    del queue.requests[:count]
    batch = table.class_for(count)
    joint = joint_batch(gpu, queue, aboard, batch, T0, ())
    riders = [r for q, first, n in joint.riders for r in q.requests[first : first + n]]
    everything = [*aboard, *riders]
    assert len(everything) <= joint.batch
    assert all(request.length <= joint.queue.length for request in everything)
    assert joint.expected_ns == gpu.tables[joint.queue.program].estimators[joint.batch].expected_ns
    apart_ns = table.estimators[batch].expected_ns
    for other, _, n in joint.riders:
        of_other = gpu.tables[other.program]
        apart_ns += of_other.estimators[of_other.class_for(n)].expected_ns
    assert joint.expected_ns <= apart_ns
    ends_ns = T0 + joint.expected_ns + gpu.worker.returns.expected_ns
    late = [request for request in riders if request.due_ns < ends_ns]
    assert not late
    if joint.riders and (joint.queue, joint.batch) != (queue, batch):
        assert all(request.due_ns >= ends_ns for request in aboard)
    assert len({id(request) for request in everything}) == len(everything)


# ----------------------------------------------------------------------- workers and whole runs


BERT = ModelProfile(
    "net",
    {1: 1},
    8 * MS,
    2**24,
    inputs=INPUTS,
    outputs=OUTPUTS,
    exec_ns_at={n: {b: round(ms * MS) for b, ms in each.items()} for n, each in TIMES.items()},
)
HELD = WorkerInstance(
    model_id=0,
    name="net",
    profile=BERT,
    largest={8: 4, 16: 4, 32: 2},
    input_bytes=-1,
    pages={0: 1},
)


def an_infer(**given: Any) -> Infer:
    fields: dict[str, Any] = {
        "session": 1,
        "action_id": 1,
        "earliest_ns": 0,
        "latest_ns": 1,
        "model_id": 0,
        "gpu_id": 0,
        "expected_duration_ns": 1,
        "batch_size": 2,
        "request_count": 2,
        "length": 16,
        "lengths": (5, 16),
        "input_sizes": (row_bytes(INPUTS, 5), row_bytes(INPUTS, 16)),
    }
    return Infer(**(fields | given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ""),
        ({"length": 9}, "no length class 9; it has 8, 16, 32"),
        ({"length": 0, "lengths": ()}, "no length class 0"),
        ({"length": 32, "batch_size": 4}, "the largest is 2"),
        ({"lengths": (5,)}, "lengths [5] for 2 request(s)"),
        ({"lengths": (5, 17)}, "lengths [5, 17]"),
        ({"lengths": (0, 16)}, "lengths [0, 16]"),
        ({"input_sizes": (row_bytes(INPUTS, 6), row_bytes(INPUTS, 16))}, "an input of length 5"),
    ],
)
def test_a_worker_refuses_a_batch_that_does_not_fit_its_class(
    given: dict[str, Any], words: str
) -> None:
    message = an_infer(**given)
    fault = infer_fault(message, HELD, message.input_sizes, zero_size_inputs=True)
    assert (fault is None) if not words else (fault is not None and words in fault[1]), fault


def simulated(seed: int = 0, **options: Any) -> SimSpec:
    lengths = Lengths(9, 1.0, 1, 32)
    workload = mix([MixEntry("net", 2, 900, (0.0, 30 * MS), lengths=lengths)], 2 * NS_PER_S)
    return SimSpec(
        workload=workload,
        scheduler=SchedulerConfig(**options),
        profiles=(GpuProfile("small", {"net": BERT}, 2**28),),
        gpus=2,
        inputs=True,
        check=True,
        seed=seed,
    )


@pytest.mark.parametrize("options", [{}, {"mix_lengths": False}, {"fidelity": "paper"}])
def test_a_simulated_run_answers_each_request_at_its_own_length(options: dict[str, Any]) -> None:
    result = simulate(simulated(**options))
    assert result.sent > 1500
    assert result.complete and result.satisfaction > (0.9 if "fidelity" not in options else 0.1)


@pytest.mark.parametrize("policy", ["FIFO", "EDF", "REJECT", "AIMD", "INFER4", "DIRECT"])
def test_every_policy_serves_length_classes(policy: str) -> None:
    result = simulate(simulated(policy=policy))
    assert result.complete and result.steps[0].codes.get("ok", 0) > 100


def test_lengths_are_drawn_within_their_bounds_and_the_same_for_the_same_seed() -> None:
    lengths = Lengths(60, 1.0, 5, 512)
    first = list(islice(lengths.draws(3), 4000))
    assert first == list(islice(lengths.draws(3), 4000)) != list(islice(lengths.draws(4), 4000))
    assert min(first) >= 5 and max(first) <= 512
    assert 50 < sorted(first)[2000] < 72
    assert read_lengths("lengths", lengths.text) == lengths


@pytest.mark.parametrize("text", ["60~1~5", "60~1~512~5", "4~1~5~512", "60~-1~5~512", "60~1~0~9"])
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfig):
        read_lengths("lengths", text)


def test_a_mix_says_its_lengths_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    text = "net:1:50:30ms::9~1~1~32"
    made = parse_workload("mix", [text, "2s"])
    assert isinstance(made, Composed)
    assert parse_workload(made.name, made.args) == made
    file = tmp_path / "mix.toml"
    file.write_text(
        'duration = "2s"\n[[models]]\nname = "net"\nrate = 50\nslo = "30ms"\nlengths = "9~1~1~32"\n'
    )
    assert load_mix(file).workload().parts == made.parts


def test_there_is_no_bound_for_models_with_length_classes() -> None:
    spec = simulated()
    with pytest.raises(InvalidConfig, match="has length classes"):
        cells_of(spec.workload, Cluster(spec.profiles, 0, 0, 100 * MS))
