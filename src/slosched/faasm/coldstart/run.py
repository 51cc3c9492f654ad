"""`slosched exp coldstart`: what each rung of the ladder of cold starts takes on this machine.

After table 3 of Faasm (USENIX ATC'20), which has a no-op in a Docker container, in a Faaslet and in a restored
Proto-Faaslet. Here the rungs are a new process, a live one, a fork of a template; no container is started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slosched.clock import now_ns
from slosched.engines import Engine
from slosched.faasm.coldstart import fill, ladder, summary
from slosched.faasm.coldstart.options import ColdstartOptions
from slosched.faasm.frame import Frame
from slosched.faasm.gpu_worker import gpu_words
from slosched.faasm.inference import functions
from slosched.faasm.inference.campaign import check_memory, check_network, planned
from slosched.faasm.inference.options import ThroughputOptions
from slosched.faasm.inference.plan import Plan, images

Options = ColdstartOptions
#: What is started, without and with a network.
NOTHING, NETWORK = "no-op", "MobileNet"
_WITHIN_S = 120.0
#: The kind of the records of what was tried.
FILL = summary.FILL
#: A fork takes less memory than a process, so that more are tried.
FORKS_FOR_ONE = 8
_WARM_CALLS = 3
#: The worker's template has the interpreter already, which a new process of its own has to start.
RELOAD = "call, reset=reload (a fork that imports all anew)"
#: About what a new process takes, and an answer: the network on a GPU, or not.
_START_S = {
    (NOTHING, False): 0.06,
    (NOTHING, True): 0.06,
    (NETWORK, False): 0.7,
    (NETWORK, True): 9.5,
}
_ANSWER_S = {NOTHING: 0.001, NETWORK: 0.035}


def check(options: ColdstartOptions) -> None:
    """Raise MissingPackage without what the network needs."""
    check_network(options.network)


def run(options: ColdstartOptions, frame: Frame) -> None:
    """Measure each rung, without a network and with one. Raises MissingPackage without torch."""
    options = options.at_scale(frame.scale)
    on_gpu = options.device == "cuda"
    frame.expect(expected_s(options))
    if on_gpu:
        frame.bill_gpus()
    asked = ThroughputOptions(
        size=options.size, network=options.network, device=options.device, seed=options.seed
    )
    if frame.measures:
        check_memory(options.instances, options.device, "--instances")
    with planned(asked) as plan:
        for what, each in ((NOTHING, None), (NETWORK, plan)):
            _processes(options, frame, what, each)
            _live(options, frame, what, each)
            _fill(options, frame, what, each)
            if not on_gpu or each is None:
                _forks(options, frame, what, each)
                _fill_forks(options, frame, what, each)
        _calls(options, frame, plan)


def expected_s(options: ColdstartOptions) -> dict[str, float]:
    """The cells, and about how long each takes, in s. `options` are those at scale."""
    on_gpu = options.device == "cuda"
    found = {}
    for what in (NOTHING, NETWORK):
        start_s = _START_S[what, on_gpu]
        new = options.repeats if what == NOTHING else max(2, options.repeats // 3)
        found[f"{what} L4"] = (new + options.instances) * start_s
        if what == NETWORK:
            found[f"{what} live"] = start_s + 5 * options.repeats * _ANSWER_S[what]
        found[f"{what} L4 fill"] = options.fill * (start_s / 2 + _ANSWER_S[what])
        if what == NOTHING or not on_gpu:
            forked_s = FORKS_FOR_ONE * options.fill * _ANSWER_S[what]
            found[f"{what} fork"] = start_s + 0.02 * options.repeats
            found[f"{what} fork fill"] = start_s + forked_s
        calls_s = (8 * options.repeats + 6) * _ANSWER_S[what]
        found[f"{what} slosched"] = 2 + max(4, options.repeats // 3) * start_s + calls_s
    return found


def report(options: ColdstartOptions, frame: Frame) -> None:
    """The table beside the published one, and the figure, from the records alone."""
    summary.show(frame)


def _record(
    options: ColdstartOptions, what: str, rung: str, name: str, found: dict[str, Any]
) -> dict[str, Any]:
    return {"what": what, "rung": rung, "start": name, "device": options.device, **found}


def _processes(options: ColdstartOptions, frame: Frame, what: str, plan: Plan | None) -> None:
    with frame.cell(f"{what} L4") as cell:
        if cell:
            count = options.repeats if plan is None else max(2, options.repeats // 3)
            found = ladder.new_processes(plan, count)
            memory = ladder.memory_of_processes(plan, options.instances)
            cell.row(_record(options, what, "L4", "new process", found | memory.record()))


def _live(options: ColdstartOptions, frame: Frame, what: str, plan: Plan | None) -> None:
    if plan is None:
        return
    names = {
        "L3": "live process: network built, weights read",
        "L2": "weights from pageable memory",
        "L1": "weights from pinned memory" if plan.device == "cuda" else "weights from host memory",
        "L0": "warm: one inference",
    }
    with frame.cell(f"{what} live") as cell:
        if cell:
            with ladder.instance(plan) as process:
                for rung, name in names.items():
                    cell.row(
                        _record(
                            options, what, rung, name, ladder.rung(process, rung, options.repeats)
                        )
                    )


def _forks(options: ColdstartOptions, frame: Frame, what: str, plan: Plan | None) -> None:
    with frame.cell(f"{what} fork") as cell:
        if cell:
            with ladder.instance(plan) as process:
                found = ladder.forks(process, 4 * options.repeats)
                memory = ladder.memory_of_forks(process, options.instances)
            cell.row(_record(options, what, "fork", "fork of a template", found | memory.record()))


def _fill(options: ColdstartOptions, frame: Frame, what: str, plan: Plan | None) -> None:
    """How many processes fit, tried."""
    with frame.cell(f"{what} L4 fill") as cell:
        if cell:
            with frame.bill() as bill:
                found = fill.processes(plan, options.fill)
            named = _record(options, what, "L4", "new process", found | bill.record())
            cell.row({"kind": FILL, **named})


def _fill_forks(options: ColdstartOptions, frame: Frame, what: str, plan: Plan | None) -> None:
    """How many forks of one template fit, tried."""
    with frame.cell(f"{what} fork fill") as cell:
        if cell:
            with frame.bill() as bill, ladder.instance(plan) as process:
                found = fill.forks(process, FORKS_FOR_ONE * options.fill)
            named = _record(options, what, "fork", "fork of a template", found | bill.record())
            cell.row({"kind": FILL, **named})


def _calls(options: ColdstartOptions, frame: Frame, plan: Plan) -> None:
    """The same by way of slosched: whole calls, from the client and back."""
    from slosched.engines.live import LiveEngine

    picture = images(plan, 1)[0]
    on_gpu = plan.device == "cuda"
    warm, new = functions.classify, functions.classify_new
    if on_gpu:
        warm, new = functions.classify_gpu, functions.classify_new_gpu
    kinds: list[tuple[str, str, str, Any, tuple[Any, ...]]] = [
        (
            NOTHING,
            "L4",
            RELOAD,
            functions.nothing_new,
            (),
        ),
        (NOTHING, "fork", "call, reset=restore", functions.nothing_restored, ()),
        (NOTHING, "L0", "call, warm slot", functions.nothing, ()),
        (NETWORK, "L4", RELOAD, new, (picture,)),
        (NETWORK, "fork", "call, reset=restore", functions.classify_restored, (picture,)),
        (NETWORK, "L0", "call, warm slot", warm, (picture,)),
    ]
    if on_gpu:
        kinds = [each for each in kinds if each[3] is not functions.classify_restored]
    for what in (NOTHING, NETWORK):
        mine = [each for each in kinds if each[0] == what]
        with frame.cell(f"{what} slosched") as cell:
            if not cell:
                continue
            words = ["--call-memory", "0"]
            words += gpu_words() if on_gpu and what == NETWORK else []
            with LiveEngine(
                [each[3] for each in mine],
                slots=1,
                logs=frame.raw(f"{what}-logs"),
                worker_options=words,
            ) as engine:
                for _, rung, name, function, arguments in mine:
                    count = max(2, options.repeats // 3) if rung == "L4" else 4 * options.repeats
                    walls = _walls(engine, function, arguments, count)
                    cell.row(_record(options, what, rung, name, ladder.times(walls, [])))


def _walls(engine: Engine, function: Any, arguments: Sequence[Any], count: int) -> list[int]:
    """How long `count` calls took, one after the other, behind a few that are not counted."""
    found = []
    for number in range(-min(count, _WARM_CALLS), count):
        began_ns = now_ns()
        engine.call(function, *arguments).result(_WITHIN_S)
        if number >= 0:
            found.append(now_ns() - began_ns)
    return found
