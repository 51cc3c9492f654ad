"""Records of stages say everything: whose cascade, on which GPU, and what a request waited for in vain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cascade_rig import CascadeRig, pair
from cascade_runs import run, spec_of
from made_cascade_run import START_NS, Made, S, a_plan, write_run
from slosched.analysis.report import write_report
from slosched.analysis.report_cascade import measure_cascades
from slosched.cascade.outcome import read_outcome
from slosched.cascade_spec import CascadeOptions
from slosched.codes import Code, Verdict
from slosched.core.scheduler.cascades import Cascades
from slosched.core.scheduler.interface import ClientLost, Effect, FromClient, PlanMade
from slosched.errors import InvalidConfig
from slosched.messages import CancelRequest
from slosched.telemetry.plan_log import HEADER as PLAN_HEADER
from slosched.telemetry.plan_log import read_plan_log
from slosched.telemetry.stage_log import COLUMNS, HEADER, read_stage_log, stage_rows
from slosched.telemetry.table import MalformedLog

# ------------------------------------------------------------------------------- whose they are


def test_the_records_of_two_cascades_name_their_own() -> None:
    other = replace(pair(), name="other", threshold=0.0)
    rig = CascadeRig(more=(other,), options=CascadeOptions(), workers=2)
    second = rig.load_named("other")
    rig.ask()
    rig.run("small", 0.2)
    rig.infer(second, slo_ms=100)
    rig.step()
    rig.run("small", 0.2)
    rig.run("large")
    assert [(each.cascade, each.verdict) for each in rig.stage_records()] == [
        ("pair", Verdict.DEFERRED),
        ("other", Verdict.ACCEPTED),
        ("pair", Verdict.HEAVY),
    ]


@pytest.mark.parametrize(("names", "named"), [(("pair",), "pair"), (("pair", "other"), "")])
def test_a_plan_without_a_name_is_the_only_cascades(names: tuple[str, ...], named: str) -> None:
    cascades = Cascades([pair(name=name) for name in names], CascadeOptions())
    emitted: list[Effect] = []
    emit = cascades.naming(emitted.append)
    for plan in (a_plan(""), a_plan("mine")):
        emit(PlanMade(plan))
    assert [each.record.cascade for each in emitted if isinstance(each, PlanMade)] == [
        named,
        "mine",
    ]


def test_a_name_with_commas_and_brackets_survives_the_log(tmp_path: Path) -> None:
    rig = CascadeRig()
    rig.ask()
    rig.run("small", 0.9)
    (record,) = rig.stage_records()
    names = ["a, b],[c", '["é"]', "", "a name that is longer than eight bytes"]
    rows = stage_rows([msgspec.structs.replace(record, cascade=name) for name in names])
    log = tmp_path / "stages.tsv"
    log.write_bytes(HEADER.encode() + b"\n" + rows + b"\n")
    assert read_stage_log(log)["cascade"].tolist() == names
    log.write_bytes(log.read_bytes().replace("é".encode(), b"\xff"))
    with pytest.raises(MalformedLog, match=r"line 3: column cascade holds .*, which is not UTF-8"):
        read_stage_log(log)


@pytest.mark.parametrize(
    ("header", "read"), [(HEADER, read_stage_log), (PLAN_HEADER, read_plan_log)]
)
def test_a_log_of_the_form_before_is_named_as_one(
    header: str, read: object, tmp_path: Path
) -> None:
    log = tmp_path / "log.tsv"
    log.write_text(header.removesuffix("\tcascade") + "\n")
    with pytest.raises(
        MalformedLog, match="an earlier version, without the column cascade; read it"
    ):
        read(log)  # type: ignore[operator]
    log.write_text("t\tsomething\n")
    with pytest.raises(MalformedLog, match="not the header of such a log; expected the"):
        read(log)  # type: ignore[operator]


def test_a_report_counts_each_cascade_of_a_run_on_its_own(tmp_path: Path) -> None:
    made = [
        Made(0, 1, [(0, 1, Verdict.ACCEPTED, 0.5)]),
        Made(0, 2, [(0, 2, Verdict.FORCED, 0.1)]),
        Made(0, 3, [(0, 3, Verdict.ACCEPTED, 0.5)]),
    ]
    folder = write_run(tmp_path / "run", made, cascades=("one", "two"))
    one, two = measure_cascades(folder, START_NS + S)
    assert (one.name, one.verdicts) == ("one", [(Verdict.ACCEPTED, 2)])
    assert (two.name, two.verdicts) == ("two", [(Verdict.FORCED, 1)])
    write_report([folder], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Verdicts of the cascade one" in page and "Stages of the cascade two" in page
    with pytest.raises(InvalidConfig, match="served the cascades 'one', 'two'; give a run of one"):
        read_outcome(folder)


# ------------------------------------------------------------------------------- where they ran


def test_an_answer_names_the_gpu_of_each_stage() -> None:
    rig = CascadeRig("CASCADE", workers=2)
    request_id = rig.ask()
    rig.cascade.threshold = 0.5
    rig.run("small", 0.25)
    rig.run("large")
    reply = rig.reply(request_id)
    records = rig.stage_records()
    assert [(s.worker_id, s.gpu_id) for s in reply.stages] == [
        (r.worker_id, r.gpu_id) for r in records
    ]
    assert (reply.stages[1].worker_id, reply.stages[1].gpu_id) == (reply.worker_id, reply.gpu_id)
    assert reply.worker_id >= 0


# --------------------------------------------------------------------------- waited for in vain


@pytest.mark.parametrize("queued", [True, False])
def test_a_deferred_request_that_is_cancelled_has_a_row_of_its_wait(queued: bool) -> None:
    rig = CascadeRig("INFER5", workers=1)
    ids = [rig.ask(slo_ms=200) for _ in range(2)]
    rig.run("small", 0.25)  # its heavy stage takes the GPU
    if queued:
        rig.run("small", 0.25)
    request_id = ids[1] if queued else ids[0]
    rig.handle(FromClient(b"c", CancelRequest(request_id)))
    rig.step()
    reply = rig.reply(request_id)
    assert reply.code == Code.CANCELLED
    light, heavy = reply.stages
    assert (light.verdict, heavy.verdict) == (Verdict.DEFERRED, Verdict.UNANSWERED)
    assert heavy.queued_ns == light.end_ns and heavy.end_ns == reply.latency_ns
    assert (heavy.start_ns, heavy.exec_ns, heavy.worker_id, heavy.gpu_id) == (-1, 0, -1, -1)
    record = rig.stage_records()[-1]
    assert (record.cascade, record.score, record.answers) == ("pair", 0.25, False)


def test_a_client_that_goes_leaves_a_row_of_its_deferred_request() -> None:
    rig = CascadeRig("INFER5", workers=1)
    rig.ask()
    rig.run("small", 0.25)
    rig.handle(ClientLost(b"c"))
    rig.steps()
    assert [each.verdict for each in rig.stage_records()] == [
        Verdict.DEFERRED,
        Verdict.UNANSWERED,
    ]
    rig.checker.recount()


def test_the_rows_of_a_request_account_for_its_whole_life(tmp_path: Path) -> None:
    """DIFFSERVE drops deferred requests: each has a row for every stretch from arrival to answer."""
    result = run(spec_of("DIFFSERVE"), tmp_path)
    stages, requests = result.stages, result.requests
    ran = {
        request_id: (t - latency, t)
        for request_id, t, latency in zip(
            requests["request_id"].tolist(),
            requests["t"].tolist(),
            requests["latency"].tolist(),
            strict=True,
        )
    }
    assert result.verdicts["UNANSWERED"] == result.codes["TIMED_OUT"] - sum(
        request_id not in set(stages["request_id"].tolist()) for request_id in ran
    )
    for request_id in np.unique(stages["request_id"]).tolist():
        rows = np.flatnonzero(stages["request_id"] == request_id)
        rows = rows[np.argsort(stages["stage"][rows])]
        ends = stages["t"][rows].tolist()
        begins = (stages["t"][rows] - stages["waited"][rows]).tolist()
        assert (begins[0], ends[-1]) == ran[request_id]
        assert begins[1:] == ends[:-1]
    assert result.verdicts["UNANSWERED"] > 10
    assert set(stages["cascade"].tolist()) == set(result.plans["cascade"].tolist()) == {"sdturbo"}
    assert list(COLUMNS)[-1] == "cascade"
