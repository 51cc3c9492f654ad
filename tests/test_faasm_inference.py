"""The load, the cold rule, the measures and the claims of the inference experiments, without any process."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from slosched.clock import now_ns
from slosched.errors import InvalidConfig, InvalidDuration, UnknownName
from slosched.faasm import layout
from slosched.faasm.inference import claims, measures
from slosched.faasm.inference.campaign import published_name
from slosched.faasm.inference.cold import ColdRule, cold_rule, container_pause_ns
from slosched.faasm.inference.instance import Answer
from slosched.faasm.inference.load import Arrivals, Closed, Loaded, Open, Run, Sender
from slosched.faasm.inference.options import LADDER_NS, LatencyOptions, ThroughputOptions
from slosched.faasm.inference.requests import (
    Done,
    Outcome,
    Reply,
    Request,
    ended,
    ok,
    read_outcomes,
    write_outcomes,
)
from slosched.faasm.inference.systems import lacks
from slosched.faasm.inference.throughput import settings_of
from slosched.units import NS_PER_MS, NS_PER_S

ANSWER = Answer(top=[1, 2, 3, 4, 5], scores=[0.5, 0.2, 0.1, 0.1, 0.1], pid=7, cold_ns=0, infer_ns=5)
IMAGES = [np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)]


class Scripted:
    """A system that ends each request as `script` says, at once or when it is given up."""

    name, about = "scripted", "for tests"

    def __init__(self, script: Callable[[Request], Reply | None]) -> None:
        self._script = script
        self.requests: list[Request] = []

    def submit(self, request: Request, done: Done) -> Callable[[], None]:
        self.requests.append(request)
        reply = self._script(request)
        if reply is not None:
            threading.Thread(target=done, args=(reply,)).start()
            return lambda: None
        return lambda: done(ended("failed", "it was given up"))

    def lacks(self, rung: str) -> str:
        return ""

    def close(self) -> None:
        """Nothing was started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def run_of(arrivals: Arrivals, rule: ColdRule | None = None, **changes: Any) -> Run:
    given = {
        "rung": "L3",
        "duration_ns": 100 * NS_PER_MS,
        "timeout_ns": 50 * NS_PER_MS,
        "seed": 1,
        **changes,
    }
    return Run(arrivals=arrivals, rule=rule or ColdRule(name="none"), **given)


def open_loop(per_s: float = 400, duration_ns: int = 100 * NS_PER_MS) -> Open:
    return Open(rate_per_s=per_s, duration_ns=duration_ns, seed=3, users=5)


# ------------------------------------------------------------------------------------ cold requests


def test_every_kth_request_of_each_instance_is_cold_and_the_first_one() -> None:
    rule = cold_rule("every:3", instances=2, seed=0)
    cold = [number for number in range(20) if rule.is_cold(number, 0)]
    assert cold == [0, 1, 6, 7, 12, 13, 18, 19]  # number // 2 % 3 == 0
    assert (rule.name, rule.interval) == ("every:3", 3)
    assert rule.share == pytest.approx(1 / 3)


def test_a_ratio_is_drawn_from_the_seed_for_each_request_apart() -> None:
    first, again = (cold_rule("20%", instances=2, seed=5) for _ in range(2))
    forward = [first.is_cold(number, 0) for number in range(2000)]
    backward = [again.is_cold(number, 0) for number in reversed(range(2000))]
    assert forward == backward[::-1]
    # Four deviations of a binomial share.
    assert abs(np.mean(forward) - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)
    other = cold_rule("20%", instances=2, seed=6)
    assert forward != [other.is_cold(number, 0) for number in range(2000)]


def test_the_first_request_of_each_user_is_cold() -> None:
    rule = cold_rule("user", instances=2, seed=0)
    assert [rule.is_cold(n, user) for n, user in enumerate([1, 2, 1, 3, 2, 1])] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert rule.share is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("5", "every:5"),
        ("ratio:0.2", "20%"),
        ("0%", "none"),
        ("every:0", "none"),
        (" user ", "user"),
    ],
)
def test_rules_are_written_in_several_ways(text: str, name: str) -> None:
    assert cold_rule(text, instances=1, seed=0).name == name


@pytest.mark.parametrize("text", ["", "sometimes", "every:-1", "ratio:2", "120%", "0.2", "every:"])
def test_what_is_not_a_rule_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(InvalidConfig, match="every:5 for each fifth"):
        cold_rule(text, instances=1, seed=0)


def test_the_emulated_start_has_the_mean_and_deviation_of_the_original() -> None:
    pauses = [container_pause_ns(1, number, 800 * NS_PER_MS) / 1e6 for number in range(2000)]
    assert min(pauses) >= 0
    assert np.mean(pauses) == pytest.approx(800, abs=4 * 400 / math.sqrt(2000) + 15)  # clipped at 0
    assert np.std(pauses) == pytest.approx(390, abs=40)
    assert container_pause_ns(1, 5, 800 * NS_PER_MS) == container_pause_ns(1, 5, 800 * NS_PER_MS)


# ------------------------------------------------------------------------------------------- load


def test_an_open_loop_sends_what_it_drew_and_counts_from_the_intended_times() -> None:
    arrivals = open_loop()
    system = Scripted(lambda request: ok(ANSWER))
    loaded = Sender(system, IMAGES).run(run_of(arrivals))
    assert [(each.intended_ns - loaded.begin_ns, each.user) for each in loaded.outcomes] == list(
        arrivals.first()
    )
    for each in loaded.outcomes:
        assert each.intended_ns <= each.sent_ns
        assert each.latency_ns == each.done_ns - each.intended_ns
    assert [each.picture for each in loaded.outcomes] == [
        n % 2 for n in range(len(loaded.outcomes))
    ]


def test_the_same_requests_are_cold_whatever_the_system_does() -> None:
    def slow_or_lost(request: Request) -> Reply | None:
        return None if request.number % 3 else ok(ANSWER)

    rule = "20%"
    seen = []
    for script in (lambda request: ok(ANSWER), slow_or_lost):
        system = Scripted(script)
        Sender(system, IMAGES).run(
            run_of(open_loop(), cold_rule(rule, instances=2, seed=9), container_ns=NS_PER_MS)
        )
        seen.append([(each.number, each.rung, each.pause_ns) for each in system.requests])
    assert seen[0] == seen[1]
    assert {"L0", "L3"} == {rung for _, rung, _ in seen[0]}
    for number, rung, pause_ns in seen[0]:
        assert pause_ns == (container_pause_ns(1, number, NS_PER_MS) if rung == "L3" else 0)


def test_a_request_without_an_answer_is_given_up_after_the_time_out_and_counted() -> None:
    loaded = Sender(Scripted(lambda request: None), IMAGES).run(run_of(open_loop()))
    assert loaded.outcomes
    for each in loaded.outcomes:
        assert each.status == "timeout"
        assert each.latency_ns >= 50 * NS_PER_MS
    found = measures.record(loaded)
    assert (found["timeout"], found["ok"], found["achieved_per_s"]) == (found["n"], 0, 0)
    assert found["p50_ms"] is None
    assert found["p50_all_ms"] is None


def test_what_is_refused_is_not_a_time_out() -> None:
    system = Scripted(lambda request: ended("refused", "code 8: no plan"))
    found = measures.record(Sender(system, IMAGES).run(run_of(open_loop())))
    assert (found["refused"], found["timeout"]) == (found["n"], 0)


def test_a_user_of_a_closed_loop_sends_again_when_it_was_answered_and_has_thought() -> None:
    system = Scripted(lambda request: ok(ANSWER))
    arrivals = Closed(connections=3, think_ns=10 * NS_PER_MS, seed=1)
    loaded = Sender(system, IMAGES).run(run_of(arrivals))
    by_user: dict[int, list[Outcome]] = {}
    for each in sorted(loaded.outcomes, key=lambda each: each.intended_ns):
        by_user.setdefault(each.user, []).append(each)
    assert set(by_user) == {0, 1, 2}
    assert len(loaded.outcomes) > 3
    for mine in by_user.values():
        for before, after in pairwise(mine):
            assert 0 <= after.intended_ns - before.done_ns <= 10 * NS_PER_MS


def test_a_user_whose_request_timed_out_goes_on() -> None:
    arrivals = Closed(connections=1, think_ns=1, seed=1)
    loaded = Sender(Scripted(lambda request: None), IMAGES).run(
        run_of(arrivals, duration_ns=180 * NS_PER_MS)
    )
    assert len(loaded.outcomes) >= 2
    assert {each.status for each in loaded.outcomes} == {"timeout"}


# --------------------------------------------------------------------------------------- measures


def outcome(
    number: int, ms: float, *, rung: str = "L0", status: Any = "ok", **more: Any
) -> Outcome:
    return Outcome(
        number=number,
        user=0,
        picture=number % 2,
        rung=rung,
        status=status,
        intended_ns=0,
        sent_ns=0,
        done_ns=round(ms * NS_PER_MS),
        top=(1, 2),
        scores=(0.5, 0.25),
        **more,
    )


def test_percentiles_are_by_nearest_rank_with_and_without_what_was_not_answered() -> None:
    outcomes = [outcome(n, n + 1) for n in range(98)]
    outcomes += [outcome(98, 9, status="timeout"), outcome(99, 9, status="failed")]
    loaded = Loaded(begin_ns=0, duration_ns=NS_PER_S, outcomes=tuple(outcomes))
    found = measures.record(loaded)
    assert (found["p50_ms"], found["p99_ms"]) == (49, 98)
    assert (found["p50_all_ms"], found["p99_all_ms"]) == (50, None)
    assert (found["n"], found["achieved_per_s"]) == (100, 98)


def test_warm_and_cold_requests_are_measured_apart() -> None:
    outcomes = [outcome(0, 5), outcome(1, 100, rung="L3"), outcome(2, 7)]
    found = measures.record(Loaded(begin_ns=0, duration_ns=NS_PER_S, outcomes=tuple(outcomes)))
    assert (found["warm_p99_ms"], found["cold_p99_ms"]) == (7, 100)
    assert found["cold_ratio"] == pytest.approx(1 / 3)


def test_an_answer_behind_the_end_is_no_throughput() -> None:
    outcomes = (outcome(0, 5), outcome(1, 2000))
    found = measures.record(Loaded(begin_ns=0, duration_ns=NS_PER_S, outcomes=outcomes))
    assert (found["ok"], found["achieved_per_s"]) == (2, 1)
    assert measures.capacity_of(found) == 1


def test_the_capacity_of_a_system_that_is_slower_than_its_run_is_what_it_took() -> None:
    outcomes = (outcome(0, 2000), outcome(1, 4000), outcome(2, 5000, status="timeout"))
    loaded = Loaded(begin_ns=0, duration_ns=NS_PER_S, outcomes=outcomes)
    assert measures.capacity_of(measures.record(loaded)) == 0.5
    nothing = Loaded(begin_ns=0, duration_ns=NS_PER_S, outcomes=outcomes[2:])
    assert measures.capacity_of(measures.record(nothing)) == 0


def test_raw_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    outcomes = [outcome(0, 5), outcome(1, 3, status="refused", reason="code 8:\tno\nplan")]
    write_outcomes(tmp_path / "raw.tsv", outcomes)
    found = read_outcomes(tmp_path / "raw.tsv")
    assert [(each.number, each.status, each.latency_ns, each.top) for each in found] == [
        (each.number, each.status, each.latency_ns, each.top) for each in outcomes
    ]
    assert found[1].reason == "code 8: no plan"
    (tmp_path / "bad.tsv").write_text((tmp_path / "raw.tsv").read_text() + "1\t2\n")
    with pytest.raises(InvalidConfig, match=r"bad\.tsv:4: not the record of a request"):
        read_outcomes(tmp_path / "bad.tsv")
    with pytest.raises(InvalidConfig, match="does not hold the requests"):
        read_outcomes(Path(__file__))


# ----------------------------------------------------------------------------------------- claims


def record(system: str, outcomes: list[Outcome], **fields: Any) -> dict[str, Any]:
    given = {"loop": "open", "cold": "20%", "rung": "L3", "fraction": 0.5, "slo_ms": 50.0, **fields}
    made = measures.record(Loaded(begin_ns=0, duration_ns=NS_PER_S, outcomes=tuple(outcomes)))
    return {"system": system, **given, **made, "raw": f"{system}-{given['cold']}"}


def raw_of(*pairs: tuple[dict[str, Any], list[Outcome]]) -> dict[str, list[Outcome]]:
    return {made["raw"]: outcomes for made, outcomes in pairs}


def test_a_refused_cold_request_was_hopeless_if_no_cold_one_is_as_fast_as_its_slo() -> None:
    mine = [outcome(0, 1, rung="L3", status="refused"), outcome(1, 9)]
    theirs = [outcome(0, 80, rung="L3"), outcome(1, 9)]
    a, b = record("slosched", mine), record("process", theirs)
    [row] = claims.refusals([a, b], raw_of((a, mine), (b, theirs)))
    assert (row["refused_cold"], row["hopeless"], row["fastest_cold_ms"]) == (1, 1, 80)
    assert row["same_requests_in_time"] == "0 of 1"


def test_a_refused_cold_request_that_others_answered_in_time_is_not_called_hopeless() -> None:
    mine = [outcome(0, 1, rung="L3", status="refused")]
    theirs = [outcome(0, 30, rung="L3")]
    a, b = record("slosched", mine), record("process", theirs)
    [row] = claims.refusals([a, b], raw_of((a, mine), (b, theirs)))
    assert (row["hopeless"], row["same_requests_in_time"]) == (0, "1 of 1")


def test_warm_requests_beside_cold_ones_are_held_against_the_same_load_without() -> None:
    warm = [outcome(n, 10) for n in range(5)]
    mixed = [outcome(0, 25), outcome(1, 90, rung="L3")]
    [row] = claims.warm_beside_cold(
        [record("slosched", warm, cold="none", rung="L0"), record("slosched", mixed)]
    )
    assert (row["times"], row["within_2"]) == (2.5, False)


def test_answers_that_differ_between_systems_are_seen() -> None:
    same = [outcome(0, 1), outcome(1, 1)]
    [first, second] = claims.answers([record("slosched", same), record("process", same)])
    assert (second["same_classes"], second["same_bits"], second["compared"]) == (2, 2, 2)
    other = [outcome(0, 1)]
    object.__setattr__(other[0], "top", (9, 9))
    [_, third] = claims.answers([record("slosched", same), record("dask", other)])
    assert (third["same_classes"], third["same_bits"], third["compared"]) == (0, 0, 1)
    assert first["compared_with"] == "slosched"


def test_answers_are_held_to_the_truth_and_those_of_another_picture_are_wrong() -> None:
    likeliest = [0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.0]
    truths = [likeliest, likeliest[::-1]]
    right = ((0, 1, 2, 3, 4), (0.3, 0.2, 0.15, 0.1, 0.05))
    turned = ((1, 0, 2, 3, 4), right[1])
    sixth = ((0, 1, 2, 3, 5), (0.3, 0.2, 0.15, 0.1, 0.02))
    nothing = ((0, 1, 2, 3, 4), (0.3, 0.2, 0.15, 0.1, float("nan")))

    def answered(top: Sequence[int], scores: Sequence[float]) -> Outcome:
        made = outcome(0, 1)
        object.__setattr__(made, "top", top)
        object.__setattr__(made, "scores", scores)
        return made

    assert measures.compared([answered(*right)], truths) == {"wrong": 0, "largest_error": 0.0}
    near = tuple(each * 1.00001 for each in right[1])
    assert measures.compared([answered(right[0], near)], truths)["wrong"] == 0
    for wrong in (
        turned,
        sixth,
        nothing,
        ((0, 1, 2), (0.3, 0.2, 0.15)),
        ((0, 0, 2, 3, 4), right[1]),
    ):
        assert measures.compared([answered(*wrong)], truths)["wrong"] == 1, wrong
    assert measures.compared([answered(*right)], truths[::-1])["wrong"] == 1
    refused = outcome(0, 1, status="refused")
    assert measures.compared([refused], truths) == {"wrong": 0, "largest_error": 0.0}
    loaded = Loaded(begin_ns=0, duration_ns=NS_PER_S, outcomes=(answered(*right), answered(*sixth)))
    found = {**measures.record(loaded, truths), "system": "loop"}
    [row] = claims.answers([found])
    assert (row["answers"], row["wrong"]) == (2, 1)


def test_the_claims_are_ratios_of_capacities_and_tails() -> None:
    def made(system: str, per_s: int, ms: float) -> list[dict[str, Any]]:
        outcomes = [outcome(n, 1) for n in range(per_s)]
        return [
            record(system, outcomes, loop="capacity"),
            record(system, [outcome(0, ms, rung="L3")]),
        ]

    rows = claims.claims([*made("slosched", 30, 20), *made("container", 10, 200)])
    assert [(row["claim"], row["found"]) for row in rows] == [
        ("2 x throughput (answers per s)", "3.00 x"),
        ("90 % lower tail (p99, ms)", "90 % lower"),
    ]
    assert [row["of"] for row in rows] == [
        "30 answers; 10 answers",
        "1 requests at 1/s, 1 cold; 1 requests at 1/s, 1 cold",
    ]


# ---------------------------------------------------------------------------------------- options


def test_the_published_scale_is_the_original_s() -> None:
    options = ThroughputOptions().at_scale("published")
    assert options.thinks_ns == tuple(LADDER_NS)
    assert options.thinks_ns[0] == 30 * NS_PER_S
    assert (min(options.fractions), max(options.fractions)) == (0.1, 1.2)
    assert options.lasts_ns("published", "L3", 25 * NS_PER_MS) == 60 * NS_PER_S
    quick = {
        each.key: each.duration_ns
        for each in settings_of(ThroughputOptions().at_scale("quick"), "quick", "container")
    }
    warm, cold = "container open cold=none L0 at=0.3", "container open cold=20% L3 at=0.3"
    assert quick[cold] == 3 * quick[warm]  # emulated starts take long, and some are to be seen
    latency = LatencyOptions().at_scale("published")
    assert latency.rules == ("none", "every:5", "every:50", "every:500")
    assert latency.lasts_ns("published", "every:5", "L3") == 480 * NS_PER_S


def test_each_cell_has_a_key_and_a_published_folder_of_its_own() -> None:
    options = ThroughputOptions(
        cold=("none", "5", "20%", "user", "ratio:0.2"),
        rungs=("L3", "L1", "L3"),
        thinks=("1ms", "1.5ms", "2s", "2000ms"),
        fractions=(0.5, 0.5),
    ).at_scale("quick")
    settings = [
        each
        for name in ("slosched", "container", "process")
        for each in settings_of(options, "quick", name)
    ]
    assert len({each.key for each in settings}) == len(settings)
    closed = [each for each in settings if each.loop == "closed"]
    folders = {
        layout.inference(
            published_name(each, options.rules),
            cold=cold_rule(each.rule, instances=2, seed=0).interval,
            threads=1,
            connections=each.connections,
            delay_ms=each.think_ns / NS_PER_MS,
            run_ns=1,
            latencies_ns=[1],
        )["folder"]
        for each in closed
    }
    assert len(folders) == len(closed) == 3 * 3 + 2 * 3 * 2 * 3 + 3 * 3
    assert "tf_image/SYSTEM_FAASM_COLD_5_THREADS_1_CONNS_100_DELAY_2000_logs" in folders
    assert "tf_image/SYSTEM_NATIVE-20_COLD_5_THREADS_1_CONNS_100_DELAY_1.5_logs" in folders


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rungs": ("L9",)}, UnknownName),
        ({"systems": ("ray",)}, UnknownName),
        ({"cold": ("often",)}, InvalidConfig),
        ({"size": "huge"}, InvalidConfig),
        ({"fractions": (0.0,)}, InvalidConfig),
        ({"thinks": ("soon",)}, InvalidDuration),
        ({"thinks": ("1us",)}, InvalidConfig),
        ({"timeout_ns": 1}, InvalidConfig),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ThroughputOptions(**options)


def test_systems_say_which_cold_starts_they_do_not_have() -> None:
    assert not lacks("slosched", "L4")
    assert not lacks("process", "L4")
    assert "another program" in lacks("loop", "L4")
    assert "with all that it runs" in lacks("dask", "L4")
    assert "emulated" in lacks("container", "L1")
    assert not lacks("container", "L3")


def test_the_clock_of_outcomes_is_that_of_the_program() -> None:
    before_ns = now_ns()
    assert before_ns <= ended("failed", "x").done_ns <= now_ns()
