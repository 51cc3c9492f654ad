"""A controller of the same cluster takes over what the workers hold; any other finds them empty."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from made_messages import a_heartbeat, a_welcome, an_error
from scheduler_rig import EXEC_MS, MS, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import FromClient, Note, SendFailed, ToWorker
from slosched.core.scheduler.sessions import TICK_NS
from slosched.core.scheduler.state import WorkerState
from slosched.core.worker.inventory import inventory_of
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    EvictWeights,
    GpuInfo,
    LengthClass,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    LoadWeights,
    Prepared,
    Span,
    UnloadModel,
    UnloadModelRequest,
    UnloadModelResult,
    WorkerRefused,
    WorkerWelcome,
)
from slosched.signature import Tensor
from slosched.units import NS_PER_S
from worker_rig import WEIGHTS_NS, VirtualWorker

# ---------------------------------------------------------------------------- the worker's side


def greet(
    worker: VirtualWorker,
    incarnation: int,
    cluster: str,
    *,
    keeps_weights: bool = True,
    times_lost: int = 0,
) -> WorkerWelcome:
    """Another controller says hello, a while after the one before was heard."""
    worker.run(2 * NS_PER_S)
    worker.answers()
    hello = ControllerHello(PROTOCOL_VERSION, incarnation, times_lost, cluster, keeps_weights)
    worker.give(hello)
    welcome = worker.answer()
    assert isinstance(welcome, WorkerWelcome), welcome
    worker.session = welcome.session
    return welcome


def holding(cluster: str = "here") -> VirtualWorker:
    """A worker that prepared "net" 0 to 2 and "other" 7, and has 0 and 7 on its GPU, for a cluster."""
    worker = VirtualWorker()
    greet(worker, 1, cluster)
    worker.load_model("net", 0, 3)
    worker.load_model("other", 7)
    for model_id in (0, 7):
        worker.load_weights(model_id)
        worker.run(WEIGHTS_NS)
    worker.answers()
    return worker


def test_the_next_controller_of_the_cluster_is_told_what_there_is() -> None:
    worker = holding()
    welcome = greet(worker, 2, "here")
    assert [(each.name, each.runs) for each in welcome.inventory] == [
        ("net", ((0, 3),)),
        ("other", ((7, 1),)),
    ]
    result = welcome.inventory[0].result
    assert isinstance(result, LoadModelResult) and result.pages == 3 and result.copies == 3
    assert welcome.gpus[0].resident == (0, 7)
    assert (welcome.incarnation, welcome.times_lost) == (2, 0)
    assert worker.brain.free_pages(0) == 4
    worker.infer(7)
    worker.run(NS_PER_S)
    assert not any(getattr(answer, "code", 0) for answer in worker.answers())


@pytest.mark.parametrize(
    ("held", "cluster"), [("here", "there"), ("here", ""), ("", ""), ("", "a")]
)
def test_any_other_controller_finds_the_worker_empty(held: str, cluster: str) -> None:
    worker = holding(held)
    welcome = greet(worker, 2, cluster)
    assert not welcome.inventory and not welcome.gpus[0].resident
    assert not worker.brain.model_ids and worker.brain.free_pages(0) == 10
    welcome = greet(worker, 3, held)  # what it held then is gone
    assert not welcome.inventory


def test_the_same_controller_after_a_loss_is_told_too() -> None:
    worker = holding()
    welcome = greet(worker, 1, "here", times_lost=1)
    assert len(welcome.inventory) == 2 and welcome.gpus[0].resident == (0, 7)
    assert (welcome.incarnation, welcome.times_lost) == (1, 1)


def test_a_controller_that_places_weights_in_its_own_way_finds_models_and_free_pages() -> None:
    worker = holding()
    welcome = greet(worker, 2, "here", keeps_weights=False)
    assert len(welcome.inventory) == 2 and not welcome.gpus[0].resident
    assert worker.brain.free_pages(0) == 10


def test_an_exec_of_the_old_session_ends_first_and_its_weights_stay() -> None:
    worker = holding()
    worker.infer(7)
    worker.give(ControllerHello(PROTOCOL_VERSION, 1, 1, "here", True))
    assert not worker.answers()
    worker.run(NS_PER_S)
    answers = worker.answers()
    assert isinstance(answers[-1], WorkerWelcome) and answers[-1].gpus[0].resident == (0, 7)


def test_an_inventory_has_a_bound_and_what_is_beyond_is_given_up() -> None:
    worker = holding()
    instances = list(worker.brain._ledger.instances.values())
    whole = inventory_of(instances)
    assert inventory_of(instances, most_bytes=200) == whole[:1]
    assert inventory_of(instances, most_bytes=10) == ()
    del worker.brain._ledger.instances[1]
    assert inventory_of(worker.brain._ledger.instances.values())[0].runs == ((0, 1), (2, 1))


# ------------------------------------------------------------------------ the controller's side

RESULT = LoadModelResult(
    session=1,
    action_id=1,
    span=Span(0, 0, 0),
    copies=1,
    batch_sizes=tuple(EXEC_MS),
    exec_ns=tuple(round(ms * MS) for ms in EXEC_MS.values()),
    weights_ns=8 * MS,
    weights_bytes=2**24,
    pages=1,
    input_shape=(4,),
    input_dtype="float32",
    output_shape=(2,),
    output_dtype="float32",
    random_weights=True,
    received_ns=0,
    sent_ns=0,
    labels=("emulated",),
)


def prepared(name: str, *runs: tuple[int, int], **fields: Any) -> Prepared:
    """What a worker holds under `name`; `fields` change its result."""
    known = {"max_batch": 16, "max_exec_ns": 25 * MS}
    known |= {key: fields.pop(key) for key in list(fields) if key in known}
    return Prepared(name=name, runs=runs, result=replace(RESULT, **fields), **known)


class Restarted(Rig):
    """A controller of the cluster "here", which was just started."""

    def __init__(self, workers: int = 1, config: SchedulerConfig | None = None) -> None:
        super().__init__(config, workers=workers, cluster_id="here", takes_over=True)
        self.hello()
        self.step()

    def bring(
        self,
        *inventory: Prepared,
        resident: tuple[int, ...] = (),
        worker_id: int = 0,
        session: int = 50,
        pages: int = 10,
        loadable: tuple[str, ...] = ("net", "other"),
        **fields: Any,
    ) -> None:
        """A worker of one GPU joins with what it holds."""
        self._sessions[worker_id] = session
        gpu = GpuInfo(0, "gpu", pages, 2**24, resident)
        welcome = a_welcome(session, (gpu,), loadable=loadable, inventory=inventory, **fields)
        self.from_worker(welcome, worker_id)
        self.steps()

    def ask_for(self, name: str, copies: int, request_id: int = 77) -> None:
        self.handle(FromClient(b"c", LoadModelRequest(request_id, name, copies)))
        self.steps()

    def gpu(self, worker_id: int = 0) -> Any:
        return self.scheduler.cluster.workers[worker_id].gpus[0]

    def cleared(self, worker_id: int = 0) -> list[int]:
        return [message.model_id for message in self.to_worker(UnloadModel, worker_id)]

    def notes(self) -> list[str]:
        return [e.text for e in self.effects if isinstance(e, Note)]


def test_instances_are_there_with_their_numbers_and_nothing_is_prepared_or_loaded_again() -> None:
    rig = Restarted()
    rig.bring(prepared("net", (0, 3)), prepared("other", (7, 1)), resident=(7, 0))
    assert list(rig.scheduler.cluster.models) == [0, 1, 2, 7]
    assert sorted(rig.gpu().resident) == [0, 7] and rig.gpu().free_pages == 7
    # Those that are not on the GPU are copied into its free pages, as every prepared model is.
    assert [load.model_id for load in rig.to_worker(LoadWeights)] == [1]
    rig.weights_loaded()
    rig.ask_for("net", 3)
    (reply,) = rig.to_client(LoadModelReply)
    assert [model.model_id for model in reply.models] == [0, 1, 2]
    assert reply.models[0].b1_ns == 2 * MS and reply.models[0].labels == ("emulated",)
    assert not rig.to_worker(LoadModel) and not rig.cleared()
    assert {load.model_id for load in rig.to_worker(LoadWeights)} == {1, 2}
    request = rig.infer(7, slo_ms=100)
    rig.step()
    rig.finish(rig.outstanding()[0], begin_ms=0)
    rig.step()
    assert rig.reply(request).code == 0


def test_an_instance_has_a_queue_for_each_length_class_that_its_worker_prepared() -> None:
    batches, exec_ns = RESULT.batch_sizes, RESULT.exec_ns
    classes = tuple(LengthClass(length, batches, exec_ns) for length in (8, 16))
    varies = (Tensor("ids", "int64", (-1,)),)
    fields = {"inputs": varies, "input_shape": (-1,), "input_dtype": "int64"}
    rig = Restarted()
    rig.bring(prepared("net", (0, 1), length_classes=classes, **fields))
    (model,) = rig.scheduler.cluster.models.values()
    assert model.lengths == (8, 16) and [queue.length for queue in model.queues] == [16, 8]
    assert not rig.to_worker(LoadModel)


def test_new_numbers_go_on_beyond_those_that_are_known() -> None:
    rig = Restarted()
    rig.bring(prepared("net", (3, 2)))
    rig.ask_for("net", 3)
    (load,) = rig.to_worker(LoadModel)
    assert (load.name, load.model_id, load.copies) == ("net", 5, 1)


def test_what_another_worker_lacks_it_prepares() -> None:
    rig = Restarted(workers=3)
    rig.bring(worker_id=0, session=60)
    rig.bring(prepared("net", (0, 2)), worker_id=1, session=61)
    (load,) = rig.to_worker(LoadModel, 0)
    assert (load.model_id, load.copies) == (0, 2)
    rig.bring(prepared("net", (1, 1)), worker_id=2, session=62)
    (load,) = rig.to_worker(LoadModel, 2)
    assert (load.model_id, load.copies) == (0, 1)
    assert not rig.to_worker(LoadModel, 1)


def test_a_worker_that_was_away_during_an_unload_gives_the_instance_up() -> None:
    rig = Restarted(workers=2)
    for worker_id in (0, 1):
        rig.bring(
            prepared("net", (0, 1)), resident=(0,), worker_id=worker_id, session=50 + worker_id
        )
    rig.scheduler.sessions.lose(rig.scheduler.cluster.workers[1], "away", now_ns=rig.now_ns)
    rig.handle(FromClient(b"c", UnloadModelRequest(5, "net")))
    for _ in range(20):
        rig.now_ns += 100 * MS
        rig.scheduler.sessions.heard(rig.scheduler.cluster.workers[0])
        rig.steps()
        for evict in rig.to_worker(EvictWeights, 0):
            rig.from_worker(an_error(evict.session, evict.action_id, 63, "gone"), 0)
    assert rig.cleared(0) == [0] and not rig.scheduler.cluster.models
    rig.bring(prepared("net", (0, 1)), resident=(0,), worker_id=1, session=70)
    assert rig.cleared(1) == [0] and not rig.scheduler.cluster.models
    gpu = rig.gpu(1)
    assert gpu.free_pages == 9  # until it says so
    unload = rig.to_worker(UnloadModel, 1)[0]
    rig.from_worker(UnloadModelResult(70, unload.action_id, received_ns=0, sent_ns=0), 1)
    assert gpu.free_pages == 10 and not gpu.brought


def test_an_unload_that_is_not_answered_loses_the_worker() -> None:
    rig = Restarted()
    rig.bring(prepared("net", (0, 1), max_batch=4), resident=(0,))
    assert rig.cleared() == [0]
    for _ in range(round(6 * NS_PER_S / TICK_NS)):
        rig.now_ns += TICK_NS
        rig.from_worker(a_heartbeat(50, rig.now_ns))
        rig.step()
    assert any("it knows nothing of UnloadModel" in text for text in rig.notes())


def test_what_was_prepared_with_other_options_is_prepared_anew_after_it_was_unloaded() -> None:
    rig = Restarted()
    rig.bring(prepared("net", (0, 2)))
    rig.scheduler.sessions.lose(rig.scheduler.cluster.workers[0], "away", now_ns=rig.now_ns)
    rig.effects.clear()
    rig.bring(prepared("net", (0, 2), max_exec_ns=5 * MS), session=51)
    sent = [*rig.to_worker(UnloadModel), *rig.to_worker(LoadModel)]
    assert [type(message).__name__ for message in sent] == ["UnloadModel"] * 2 + ["LoadModel"]
    assert sent[0].action_id < sent[1].action_id < sent[2].action_id


def test_an_id_that_means_another_model_is_unloaded_before_anything_is_prepared_there() -> None:
    rig = Restarted(workers=2)
    rig.bring(worker_id=0, session=60)
    rig.now_ns += 3 * NS_PER_S
    rig.scheduler.sessions.heard(rig.scheduler.cluster.workers[0])
    rig.ask_for("other", 2)
    rig.effects.clear()
    rig.bring(prepared("net", (0, 4)), prepared("other", (4, 1)), worker_id=1, session=61)
    assert rig.cleared(1) == [0, 1, 4]
    loads = rig.to_worker(LoadModel, 1)
    assert [(load.name, load.model_id, load.copies) for load in loads] == [("other", 0, 2)]
    unloads = [message.action_id for message in rig.to_worker(UnloadModel, 1)]
    assert max(unloads) < loads[0].action_id
    names = {model_id: model.name for model_id, model in rig.scheduler.cluster.models.items()}
    # Number 4 stays out: instances of its name are being made, behind all numbers that were known.
    assert names == {0: "other", 1: "other", 2: "net", 3: "net"}


def test_what_is_made_while_a_worker_is_looked_at_is_prepared_there_afterwards() -> None:
    rig = Restarted(workers=2)
    rig.bring(worker_id=0, session=60)
    rig.now_ns += 3 * NS_PER_S
    rig.scheduler.sessions.heard(rig.scheduler.cluster.workers[0])
    rig.handle(FromClient(b"c", LoadModelRequest(77, "other", 2_000)))
    rig.effects.clear()
    rig.bring(prepared("net", (0, 4_000)), worker_id=1, session=61)
    sent = [e.message for e in rig.effects if isinstance(e, ToWorker) and e.worker_id == 1]
    kinds = [type(message).__name__ for message in sent]
    assert kinds.index("LoadModel") > len(kinds) - 1 - kinds[::-1].index("UnloadModel")
    assert kinds.count("UnloadModel") == 2_000
    assert [message.copies for message in rig.to_worker(LoadModel, 1)] == [2_000]


def test_workers_that_hold_different_models_under_a_name_are_settled_as_ever() -> None:
    rig = Restarted(workers=2)
    rig.bring(prepared("net", (0, 2)), worker_id=0, session=60)
    rig.bring(prepared("net", (0, 2), input_shape=(5,)), worker_id=1, session=61)
    second = rig.scheduler.cluster.workers[1]
    assert list(second.unlike) == ["net"] and not second.instances
    assert not rig.to_worker(LoadModel) and not rig.cleared(1)
    rig.scheduler.sessions.lose(rig.scheduler.cluster.workers[0], "gone", now_ns=rig.now_ns)
    rig.steps()
    assert list(second.instances) == [0, 1] and not second.unlike


def test_weights_of_a_model_that_differs_do_not_keep_their_pages() -> None:
    rig = Restarted(workers=2)
    rig.bring(prepared("net", (0, 1)), worker_id=0, session=60)
    rig.bring(prepared("net", (0, 1), pages=2), resident=(0,), worker_id=1, session=61)
    assert rig.cleared(1) == [0]
    (load,) = rig.to_worker(LoadModel, 1)
    assert load.model_id == 0


def test_the_same_controller_keeps_weights_over_a_loss_of_the_worker() -> None:
    rig = Restarted()
    rig.bring(prepared("net", (0, 1)), resident=(0,))
    worker = rig.scheduler.cluster.workers[0]
    rig.scheduler.sessions.lose(worker, "a partition", now_ns=rig.now_ns)
    assert not rig.scheduler.cluster.models[0].resident_on
    rig.bring(prepared("net", (0, 1)), resident=(0,), session=51, incarnation=1, times_lost=1)
    assert list(rig.gpu().resident) == [0] and rig.gpu().free_pages == 9
    assert not rig.to_worker(LoadModel) and not rig.to_worker(LoadWeights)


@pytest.mark.parametrize("late", [{"times_lost": 0}, {"incarnation": 9}])
def test_a_welcome_that_comes_late_is_of_no_use(late: dict[str, Any]) -> None:
    rig = Restarted()
    rig.bring(prepared("net", (0, 1)), incarnation=1, times_lost=0)
    worker = rig.scheduler.cluster.workers[0]
    rig.scheduler.sessions.lose(worker, "a partition", now_ns=rig.now_ns)
    fields: dict[str, Any] = {"incarnation": 1, "times_lost": 1} | late
    rig.bring(prepared("net", (0, 1)), resident=(0,), **fields)
    assert worker.state is WorkerState.SILENT


def test_published_policies_are_told_of_models_and_begin_without_weights() -> None:
    rig = Restarted(config=SchedulerConfig(policy="INFER4"))
    hello = rig.to_worker(ControllerHello)[0]
    assert hello.cluster == "here" and not hello.keeps_weights
    rig = Restarted()
    assert rig.to_worker(ControllerHello)[0].keeps_weights


def test_loads_wait_a_moment_for_workers_that_may_bring_their_models() -> None:
    rig = Restarted(workers=2)
    rig.bring(worker_id=0, session=60)
    rig.ask_for("net", 2)
    refused = WorkerRefused(Code.INITIALIZING, "it is in use by another controller")
    rig.from_worker(refused, 1)
    assert not rig.to_worker(LoadModel)
    rig.now_ns += 1_200 * MS
    rig.scheduler.sessions.heard(rig.scheduler.cluster.workers[0])
    rig.bring(prepared("net", (4, 2)), worker_id=1, session=61)
    assert [load.model_id for load in rig.to_worker(LoadModel, 0)] == [4]
    assert not rig.to_worker(LoadModel, 1)

    alone = Restarted(workers=2)
    alone.bring(worker_id=0, session=60)
    alone.ask_for("net", 2)
    for _ in range(25):
        alone.now_ns += 100 * MS
        alone.scheduler.sessions.heard(alone.scheduler.cluster.workers[0])
        alone.handle(SendFailed(1, ControllerHello(PROTOCOL_VERSION, 1, 0)))
        alone.steps()
    assert [load.model_id for load in alone.to_worker(LoadModel, 0)] == [0]


def test_spares_that_brought_models_are_looked_at_when_they_are_used() -> None:
    rig = Restarted(workers=2, config=SchedulerConfig(max_gpus=1))
    rig.bring(prepared("net", (0, 1)), resident=(0,), worker_id=0, session=60)
    rig.bring(prepared("net", (0, 2)), resident=(0,), worker_id=1, session=61)
    assert list(rig.scheduler.cluster.models) == [0]
    rig.scheduler.sessions.lose(rig.scheduler.cluster.workers[0], "gone", now_ns=rig.now_ns)
    for _ in range(round(11 * NS_PER_S / TICK_NS)):
        rig.now_ns += TICK_NS
        rig.from_worker(a_heartbeat(61, rig.now_ns), 1)
        rig.steps()
    assert list(rig.gpu(1).resident) == [0] and list(rig.scheduler.cluster.models) == [0, 1]
    assert not rig.to_worker(LoadModel, 1)


@pytest.mark.parametrize(
    ("inventory", "resident", "said"),
    [
        ((prepared("net", (0, 2)), prepared("other", (1, 1))), (), "an id twice"),
        ((prepared("net", (0, 1)), prepared("net", (5, 1))), (), "each name once"),
        ((prepared("", (0, 1)),), (), "each name once"),
        ((prepared("a\nb", (0, 1)),), (), "each name once"),
        ((prepared("net"),), (), "without instances"),
        ((prepared("net", (-1, 1)),), (), "cannot be"),
        ((prepared("net", (0, 0)),), (), "cannot be"),
        ((prepared("net", (2**40, 1)),), (), "cannot be"),
        ((prepared("net", (0, 2**50)),), (), "cannot be"),
        (tuple(prepared(f"n{i}", (i * 10**6, 150_000)) for i in range(2)), (), "more than 200000"),
        ((prepared("net", (0, 1), pages=0),), (), "0 pages"),
        ((prepared("net", (0, 1), batch_sizes=(2,), exec_ns=(1,)),), (), "rise from 1"),
        ((prepared("net", (3, 2)),), (2,), "does not hold"),
        ((prepared("net", (3, 2)),), (5,), "does not hold"),
        ((), (0,), "does not hold"),
        ((prepared("net", (0, 2)),), (1, 1), "there twice"),
        ((prepared("net", (0, 2), pages=6),), (0, 1), "12 of 10 pages"),
    ],
)
def test_an_inventory_that_cannot_be_is_refused(
    inventory: tuple[Prepared, ...], resident: tuple[int, ...], said: str
) -> None:
    rig = Restarted()
    rig.bring(*inventory, resident=resident)
    assert rig.scheduler.cluster.workers[0].state is WorkerState.SILENT
    assert any("is not used" in text and said in text for text in rig.notes()), rig.notes()


def test_a_worker_that_is_drained_while_it_is_looked_at_is_not_used() -> None:
    rig = Restarted(workers=2, config=SchedulerConfig(operators=("c",)))
    rig.bring(worker_id=0, session=60)
    gpu = GpuInfo(0, "gpu", 5000, 2**24, tuple(range(4000)))
    welcome = a_welcome(61, (gpu,), inventory=(prepared("net", (0, 4000)),))
    rig.from_worker(welcome, 1)
    rig.scheduler.schedule(now_ns=rig.now_ns)
    assert rig.scheduler.slicing
    worker = rig.scheduler.cluster.workers[1]
    rig.scheduler.sessions.drain(worker, now_ns=rig.now_ns)
    for _ in range(200):
        rig.scheduler.schedule(now_ns=rig.now_ns)
    models = rig.scheduler.cluster.models.values()
    assert not any(model.resident_on for model in models) and worker.state is WorkerState.DRAINED


def test_the_number_of_instances_stays_within_its_bound() -> None:
    rig = Restarted(config=SchedulerConfig(max_instances=3))
    rig.bring(prepared("net", (0, 5)))
    assert list(rig.scheduler.cluster.models) == [0, 1, 2] and rig.cleared() == [3, 4]
