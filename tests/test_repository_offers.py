"""What a worker offers changes while it runs: its brain, the controller, and what a plain name means."""

from __future__ import annotations

from typing import Any

import pytest

from made_messages import a_welcome
from scheduler_rig import Rig
from slosched.cli.status_text import status_text
from slosched.codes import Code
from slosched.config import WorkerConfig
from slosched.core.client.held import Held
from slosched.core.scheduler.interface import FromClient, Note
from slosched.core.scheduler.sessions import TICK_NS
from slosched.core.worker.offers import Offers
from slosched.daemon.status import status_report
from slosched.errors import InvalidConfig
from slosched.messages import (
    GpuInfo,
    Heartbeat,
    HeartbeatAck,
    InferReply,
    ListModelsReply,
    ListModelsRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    LoadWeightsResult,
    ModelInfo,
    Offer,
    UnloadModelReply,
    UnloadModelRequest,
    WorkerGoodbye,
)
from slosched.units import NS_PER_S
from worker_rig import WEIGHTS_NS, VirtualWorker

LEFT_OUT = (("digits:3", "it has no config.json"),)


# ----------------------------------------------------------------------------- a worker's side


def test_offers_count_their_changes_and_keep_what_does_not_change() -> None:
    offers = Offers(("net", "square", "bad"), (("bad", "it crashed"),), ("square",))
    assert (offers.loadable, offers.functions, offers.number) == (("net", "square"), ("square",), 0)
    assert not offers.change(("square", "net", "bad"), (), now_ns=0)
    assert offers.change(("net", "net:2"), LEFT_OUT, now_ns=0)
    message = offers.message(7)
    assert (message.session, message.number) == (7, 1)
    assert message.loadable == ("net", "net:2", "square") and message.left_out == LEFT_OUT
    assert not offers.change(("net:2", "net"), LEFT_OUT, now_ns=0)
    assert offers.change(("net:2", "net"), (), now_ns=0) and offers.number == 2


def test_an_offer_is_said_again_until_an_ack_has_its_number() -> None:
    offers = Offers(("net",))
    assert not offers.unheard(0, now_ns=0)
    offers.change(("net", "net:2"), (), now_ns=0)
    assert not offers.unheard(0, now_ns=NS_PER_S - 1)
    assert offers.unheard(0, now_ns=NS_PER_S)
    assert not offers.unheard(0, now_ns=NS_PER_S + 1)
    assert not offers.unheard(1, now_ns=5 * NS_PER_S)


def test_a_worker_tells_what_has_changed_and_takes_what_it_offers() -> None:
    worker = VirtualWorker()
    worker.brain.offer(("net",), LEFT_OUT, now_ns=worker.now)  # there is no session
    welcome = worker.hello()
    assert (welcome.loadable, welcome.offer, welcome.left_out) == (("net",), 1, LEFT_OUT)
    worker.load_model("other")
    assert worker.error()[0] == Code.UNKNOWN_MODEL
    worker.brain.offer(("net", "other"), (), now_ns=worker.now)
    worker.stepper.step(worker.now)
    offer = Offer(session=welcome.session, number=2, loadable=("net", "other"))
    assert worker.answer() == offer
    worker.load_model("other")
    assert isinstance(worker.answer(), LoadModelResult)
    worker.brain.offer(("net",), (), now_ns=worker.now)
    worker.stepper.step(worker.now)
    assert isinstance(worker.answer(), Offer)
    worker.load_weights()  # what is prepared stays
    worker.run(WEIGHTS_NS)
    assert isinstance(worker.answer(), LoadWeightsResult)
    worker.brain.shutdown(now_ns=worker.now)
    worker.stepper.step(worker.now)
    worker.answers()
    worker.brain.offer(("net", "other"), (), now_ns=worker.now)
    worker.stepper.step(worker.now)
    assert not worker.answers()


def test_a_lost_offer_is_repeated_by_the_next_acks() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.brain.offer(("net",), (), now_ns=worker.now)
    worker.stepper.step(worker.now)
    assert isinstance(worker.answer(), Offer)
    for heard, repeated in ((0, 1), (0, 1), (1, 0), (1, 0)):
        worker.run(2 * NS_PER_S)
        sent_ns = worker.beats[-1].sent_ns
        worker.give(HeartbeatAck(sent_ns, worker.now, worker.now, heard))
        assert [type(each) for each in worker.answers()] == [Offer] * repeated


# ------------------------------------------------------------------------- a controller's side


class Offering(Rig):
    """Workers with repositories."""

    def joins(self, *names: str, worker_id: int = 0, **more: Any) -> None:
        self._sessions[worker_id] = 50 + worker_id
        gpus = (GpuInfo(0, "gpu", 100, 2**24),)
        self.from_worker(a_welcome(50 + worker_id, gpus, loadable=names, **more), worker_id)
        self.step()

    def offers(self, number: int, *names: str, worker_id: int = 0, **more: Any) -> None:
        self.from_worker(
            Offer(session=50 + worker_id, number=number, loadable=names, **more), worker_id
        )
        self.steps()

    def asks(self, name: str, copies: int = 1, client: bytes = b"c") -> int:
        self._request_id += 1
        self.handle(FromClient(client, LoadModelRequest(self._request_id, name, copies)))
        self.steps()
        return self._request_id

    def loads(self, name: str, *, workers: tuple[int, ...] = (0,)) -> LoadModelReply:
        request_id = self.asks(name)
        for worker_id in workers:
            self.prepared(worker_id)
        self.steps()
        for worker_id in workers:
            self.weights_loaded(worker_id)
        self.steps()
        return self.reply_to(request_id)

    def reply_to(self, request_id: int) -> LoadModelReply:
        [reply] = [r for r in self.to_client(LoadModelReply) if r.request_id == request_id]
        return reply

    def unloads(self, name: str) -> UnloadModelReply:
        self._request_id += 1
        self.handle(FromClient(b"c", UnloadModelRequest(self._request_id, name)))
        self.steps()
        return self.to_client(UnloadModelReply)[-1]

    def listing(self) -> ListModelsReply:
        self._request_id += 1
        self.handle(FromClient(b"c", ListModelsRequest(self._request_id)))
        self.steps()
        return self.to_client(ListModelsReply)[-1]

    def listed(self) -> tuple[str, ...]:
        return self.listing().loadable

    def notes(self) -> str:
        return "\n".join(e.text for e in self.effects if isinstance(e, Note))


@pytest.fixture
def rig() -> Offering:
    made = Offering(workers=2)
    made.hello()
    return made


def names_of(reply: LoadModelReply) -> list[str]:
    assert reply.code == Code.OK, reply.reason
    return [info.name for info in reply.models]


def test_a_plain_name_is_the_newest_version_that_any_worker_offers(rig: Offering) -> None:
    rig.joins("digits:2", "digits:10")
    rig.joins("digits:2", "digits:9", worker_id=1)
    assert names_of(rig.loads("digits")) == ["digits:10"]
    assert names_of(rig.loads("digits:2", workers=(0, 1))) == ["digits:2"]
    assert rig.listed() == ("digits:10", "digits:2", "digits:9")
    asked = [(a.name, a.session) for a in rig.to_worker(LoadModel)]
    assert asked == [("digits:10", 50), ("digits:2", 50), ("digits:2", 51)]


def test_a_model_of_the_plain_name_goes_before_its_versions(rig: Offering) -> None:
    rig.joins("resnet50", "resnet50:3")
    assert names_of(rig.loads("resnet50_v2")) == ["resnet50"]
    assert names_of(rig.loads("resnet50:3")) == ["resnet50:3"]


def test_a_load_that_waits_for_workers_takes_what_they_offer(rig: Offering) -> None:
    request_id = rig.asks("digits")
    rig.joins("digits:4")
    rig.steps()
    rig.prepared()
    rig.weights_loaded()
    rig.steps()
    assert names_of(rig.reply_to(request_id)) == ["digits:4"]


def test_a_new_version_is_known_at_once_and_an_old_handle_stays(rig: Offering) -> None:
    rig.joins("digits:1")
    [first] = rig.loads("digits").models
    rig.offers(1, "digits:1", "digits:2")
    assert "offers digits:2" in rig.notes() and rig.listed() == ("digits:1", "digits:2")
    [second] = rig.loads("digits").models
    assert (first.name, second.name) == ("digits:1", "digits:2")
    rig.offers(2, "digits:2")
    assert "does not offer any more digits:1" in rig.notes() and rig.listed() == ("digits:2",)
    asked = rig.infer(first, slo_ms=500)
    rig.step()
    [infer] = rig.outstanding()
    rig.finish(infer, begin_ms=1)
    rig.step(10)
    assert [r.code for r in rig.to_client(InferReply) if r.request_id == asked] == [Code.OK]
    request_id = rig.asks("digits:1", copies=2)
    assert rig.reply_to(request_id).code == Code.UNKNOWN_MODEL


def test_a_worker_that_offers_what_others_have_loaded_prepares_it(rig: Offering) -> None:
    rig.joins("digits:1")
    rig.joins("net", worker_id=1)
    rig.loads("digits")
    assert not rig.to_worker(LoadModel, 1)
    rig.offers(1, "net", "digits:1", worker_id=1)
    assert [a.name for a in rig.to_worker(LoadModel, 1)] == ["digits:1"]
    rig.offers(2, "net", "digits:1", "digits:2", worker_id=1)
    assert len(rig.to_worker(LoadModel, 1)) == 1


def test_old_news_and_news_of_another_session_change_nothing(rig: Offering) -> None:
    rig.joins("digits:1", offer=5)
    for number, session in ((5, 50), (4, 50), (9, 51)):
        message = Offer(session=session, number=number, loadable=("x",))
        rig.from_worker(message)
        rig.steps()
        assert rig.listed() == ("digits:1",)
    rig.offers(6, "x", "y\n", "")
    assert rig.listed() == ("", "x")


def test_an_ack_says_which_offer_has_arrived(rig: Offering) -> None:
    rig.joins("digits:1", offer=5)
    rig.offers(6, "digits:1", "digits:2")
    beat = Heartbeat(session=50, sent_ns=1, clock_offset_ns=0, clock_error_ns=0, preparing=0)
    rig.from_worker(beat)
    rig.step()
    assert rig.to_worker(HeartbeatAck)[-1].offer == 6


def test_functions_stay_whatever_a_message_says(rig: Offering) -> None:
    rig.joins("digits:1", "square", functions=("square",))
    rig.offers(1, "digits:2")
    worker = rig.scheduler.cluster.workers[0]
    assert worker.loadable == ("digits:2", "square") and list(worker.functions) == ["square"]


def test_what_is_left_out_is_in_the_status_and_in_the_answer(rig: Offering) -> None:
    rig.joins("digits:2", left_out=LEFT_OUT)
    reply = rig.reply_to(rig.asks("digits:3"))
    assert reply.code == Code.INVALID_MODEL_PATH and "it has no config.json" in reply.reason
    assert names_of(rig.loads("digits")) == ["digits:2"]
    report = status_report(rig.scheduler, now_ns=rig.now_ns)
    assert report["workers"][0]["left_out"] == dict(LEFT_OUT)
    assert "worker 0 leaves digits:3 of its repository out: it has no" in status_text("", report)
    rig.joins("digits:2", worker_id=1, left_out=(("digits:4", "why"), ("digits:2", "hidden")))
    assert rig.listing().left_out == (*LEFT_OUT, ("digits:4", "why"))
    rig.offers(1, "digits:2", worker_id=1)
    assert rig.listing().left_out == LEFT_OUT
    rig.offers(1, "digits:2", left_out=(("other:1\x1b[2J", "x\n" * 9_000),))
    [(name, reason)] = rig.scheduler.cluster.workers[0].left_out.items()
    assert name.isprintable() and reason.isprintable() and len(reason) <= 300
    assert rig.notes().count("digits:3") == 1
    asked = rig.reply_to(rig.asks("other"))
    assert asked.code == Code.UNKNOWN_MODEL


def test_a_version_that_vanishes_while_it_is_loaded_is_named_and_no_other(rig: Offering) -> None:
    rig.joins("digits:4", left_out=LEFT_OUT)
    request_id = rig.asks("digits")
    rig.offers(1, left_out=LEFT_OUT)
    reply = rig.reply_to(request_id)
    assert reply.code == Code.UNKNOWN_MODEL
    assert "digits:4" in reply.reason and "digits:3" not in reply.reason


def test_other_files_under_a_name_are_not_used_beside_the_first(rig: Offering) -> None:
    rig.joins("digits:1")
    rig.joins("digits:1", worker_id=1)
    rig.asks("digits")
    for worker_id, digest in ((0, "a" * 64), (1, "b" * 64)):
        rig.prepared(worker_id, digest=digest)
        rig.steps()
    second = rig.scheduler.cluster.workers[1]
    assert not second.prepared and "files bbbbbbbb" in second.unlike["digits:1"].reason
    rig.weights_loaded()
    rig.from_worker(WorkerGoodbye(50))
    rig.steps()
    assert second.prepared["digits:1"].digest == "b" * 64 and not second.unlike


def test_a_plain_name_unloads_each_version_that_the_client_uses(rig: Offering) -> None:
    rig.joins("digits:1", "digits:2", "digitsx:1")
    for name in ("digits:1", "digits:2", "digitsx:1"):
        rig.loads(name)
    reply = rig.unloads("digits")
    assert (reply.code, reply.unloaded, reply.kept) == (Code.OK, 2, 0)
    used = {m.name: len(m.clients) for m in rig.scheduler.cluster.models.values()}
    assert used.get("digits:1", 0) == used.get("digits:2", 0) == 0 and used["digitsx:1"] == 1
    assert rig.unloads("nothing").code == Code.UNKNOWN_MODEL
    for _ in range(20):
        rig.now_ns += TICK_NS
        rig.steps()
    assert rig.unloads("digitsx:1").unloaded == 1


# -------------------------------------------------------------------------------- client, config


def info(name: str) -> ModelInfo:
    return ModelInfo(
        model_id=1,
        name=name,
        copy=0,
        batch_sizes=(1,),
        b1_ns=1,
        weights_ns=1,
        weights_bytes=1,
        input_shape=(1,),
        input_dtype="float32",
        output_shape=(1,),
        output_dtype="float32",
        random_weights=False,
        gpus_resident=0,
        clients=0,
        labels=(),
    )


def test_a_client_loads_the_version_again_that_its_callers_hold() -> None:
    held = Held()
    held.loaded("digits", [info("digits:1")], 1)
    held.loaded("resnet50_v2", [info("resnet50")], 1)
    held.loaded("digits", [info("digits:2")], 1)
    assert held.to_load_again() == [("digits:1", 1), ("resnet50_v2", 1), ("digits:2", 1)]
    assert held.under("digits") == ["digits:1", "digits:2"] and held.under("digits:1") == [
        "digits:1"
    ]
    held.unloaded("digits:1")
    assert held.to_load_again() == [("resnet50_v2", 1), ("digits:2", 1)]
    held.unloaded("digits")
    assert held.to_load_again() == [("resnet50_v2", 1)]


@pytest.mark.parametrize("device", ["emulated", "none"])
def test_a_worker_without_models_of_its_own_has_no_repository(device: str) -> None:
    with pytest.raises(InvalidConfig, match="leave repository out"):
        WorkerConfig(device=device, repository="models", functions=("math:sqrt",))
