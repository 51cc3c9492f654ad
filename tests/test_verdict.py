"""Verdicts on SLOs: LoadGen's numbers, scipy's as an independent check, and what results say of them."""

from __future__ import annotations

import json
import math
import random
from array import array
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.cli.output import run_table
from slosched.errors import InvalidConfig
from slosched.loadgen.results import (
    RunResult,
    StepResult,
    StepTally,
    issue_delay_bound_ns,
    pooled_verdict,
    run_result,
)
from slosched.loadgen.verdict import (
    Outcome,
    Verdict,
    at_most,
    judge,
    least_samples,
    least_sent,
    most_late,
    rank_of_bound,
    sentence,
)
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads import parse_workload
from slosched.workloads.engine import Engine

SHARES = st.sampled_from([0.5, 0.9, 0.95, 0.97, 0.99, 0.999])


# ------------------------------------------------------------------------------- LoadGen's numbers


@pytest.mark.parametrize(
    ("percentile", "least"),
    # "Need to process at least N queries", as its results' summaries say for p90 and p99.
    [(0.9, 64), (0.99, 662)],
)
def test_a_percentile_needs_as_many_samples_as_mlperf_says(percentile: float, least: int) -> None:
    assert least_samples(percentile) == least
    assert most_late(least, percentile=percentile) == 1
    assert rank_of_bound(least, percentile=percentile) == least - 1  # the slowest of them
    assert rank_of_bound(least - 1, percentile=percentile) is None


def test_without_a_late_one_459_requests_do() -> None:
    assert least_sent(0) == math.ceil(math.log(0.01) / math.log(0.99)) == 459
    assert judge(459, 0).outcome is Outcome.HOLDS
    # Summaries of its Server scenario: "Processed 21 queries. Would need to run at least 438 more".
    assert judge(21, 0) == Verdict(
        outcome=Outcome.UNDECIDED, sent=21, late=0, needs=438, percentile=0.99, confidence=0.99
    )
    assert judge(300, 0).needs == 159


@pytest.mark.parametrize(("queries", "discarded"), [(2048, 172), (2116, 178), (7469, 685)])
def test_as_many_slow_ones_are_discarded_as_in_published_results(
    queries: int, discarded: int
) -> None:
    rank = rank_of_bound(queries, percentile=0.9)
    assert rank is not None and queries - 1 - rank == discarded


def test_the_numbers_are_exact() -> None:
    """In integers, at both sides of a border: at most `late` of `sent`, each late with 1 in 100."""

    def exact(late: int, sent: int) -> Fraction:
        ways = sum(math.comb(sent, k) * 99 ** (sent - k) for k in range(late + 1))
        return Fraction(ways, 100**sent)

    for late in (0, 1, 2, 5, 17):
        least = least_sent(late)
        assert exact(late, least) <= Fraction(1, 100) < exact(late, least - 1)
        assert at_most(late, least, 0.01) == pytest.approx(float(exact(late, least)), rel=1e-9)


# ------------------------------------------------------------------------------------------ scipy


@settings(max_examples=300, deadline=None)
@given(data=st.data(), trials=st.integers(1, 200_000), share=SHARES)
def test_the_tail_is_that_of_scipy(data: st.DataObject, trials: int, share: float) -> None:
    binom = pytest.importorskip("scipy.stats").binom
    chance = 1 - share
    width = 8 * math.sqrt(trials * chance) + 5
    low, high = (round(trials * chance + sign * width) for sign in (-1, 1))
    count = data.draw(st.integers(max(-1, low), min(trials, high)))
    assert at_most(count, trials, chance) == pytest.approx(
        binom.cdf(count, trials, chance), rel=1e-7, abs=1e-12
    )


@settings(max_examples=150, deadline=None)
@given(
    late=st.integers(0, 3000),
    percentile=SHARES,
    confidence=st.sampled_from([0.9, 0.99, 0.9975, 0.9999]),
)
def test_borders_are_where_scipy_has_them(late: int, percentile: float, confidence: float) -> None:
    binom = pytest.importorskip("scipy.stats").binom
    least = least_sent(late, percentile=percentile, confidence=confidence)
    doubt, chance = 1 - confidence, 1 - percentile
    assert binom.cdf(late, least, chance) <= doubt * (1 + 1e-7)
    assert binom.cdf(late, least - 1, chance) > doubt * (1 - 1e-7)
    # The inverse: this number may be late out of `least`, and not out of one less.
    assert most_late(least, percentile=percentile, confidence=confidence) == late
    assert most_late(least - 1, percentile=percentile, confidence=confidence) == late - 1


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sent=st.integers(0, 50_000), percentile=SHARES)
def test_a_verdict_follows_from_the_two_tails(
    data: st.DataObject, sent: int, percentile: float
) -> None:
    binom = pytest.importorskip("scipy.stats").binom
    width = 6 * math.sqrt(sent * (1 - percentile)) + 5
    mean = sent * (1 - percentile)
    late = data.draw(
        st.integers(max(0, math.floor(mean - width)), min(sent, math.ceil(mean + width)))
    )
    verdict = judge(sent, late, percentile=percentile)
    few = binom.cdf(late, sent, 1 - percentile)
    many = binom.sf(late - 1, sent, 1 - percentile)
    if verdict.outcome is Outcome.HOLDS:
        assert few <= 0.01 + 1e-9
    elif verdict.outcome is Outcome.FAILS:
        assert many <= 0.01 + 1e-9
    else:
        assert few > 0.01 - 1e-9 and many > 0.01 - 1e-9
        more = judge(sent + verdict.needs, late, percentile=percentile)
        assert more.outcome is Outcome.HOLDS
        if verdict.needs > 1:
            less = judge(sent + verdict.needs - 1, late, percentile=percentile)
            assert less.outcome is Outcome.UNDECIDED
    assert (verdict.needs > 0) == (verdict.outcome is Outcome.UNDECIDED)


def test_one_more_late_never_makes_it_hold() -> None:
    order = [Outcome.HOLDS, Outcome.UNDECIDED, Outcome.FAILS]
    for sent in (0, 10, 459, 662, 5000):
        seen = [order.index(judge(sent, late).outcome) for late in range(min(sent, 200) + 1)]
        assert seen == sorted(seen)


def test_wrong_verdicts_are_as_rare_as_promised() -> None:
    """A share of just 99 %, many times: it is said to hold, or to fail, in at most 1 % each."""
    draw = random.Random(5)
    sent, trials = 2000, 1000
    outcomes = [
        judge(sent, sum(draw.random() < 0.01 for _ in range(sent))).outcome for _ in range(trials)
    ]
    # Four standard deviations of a count with mean 10.
    assert outcomes.count(Outcome.HOLDS) <= 22 and outcomes.count(Outcome.FAILS) <= 22


def test_the_bound_of_p99_is_above_it() -> None:
    """The p99 of evenly drawn latencies is known: the bound is below it at most once in a hundred."""
    draw = random.Random(11)
    trials, count = 400, 1500
    rank = rank_of_bound(count)
    assert rank is not None
    below = sum(sorted(draw.random() for _ in range(count))[rank] < 0.99 for _ in range(trials))
    assert below <= 0.02 * trials


@pytest.mark.parametrize(
    ("sent", "late", "shares"),
    [(10, 11, {}), (10, -1, {}), (10, 1, {"percentile": 1.0}), (10, 1, {"confidence": 0.0})],
)
def test_what_cannot_be_is_said(sent: int, late: int, shares: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig):
        judge(sent, late, **shares)


# --------------------------------------------------------------------------------------- in words


def test_the_sentence_names_every_step_once() -> None:
    steps = [
        ("300/s", judge(3000, 0)),
        ("600/s", judge(6000, 30)),
        ("790/s", judge(7900, 40)),
        ("820/s", judge(612, 5)),
        ("850/s", judge(3000, 100)),
        ("900/s", None),
    ]
    assert sentence("SLO 25ms", steps) == (
        "SLO 25ms: 99 % in time (client), with 99 % confidence: at 300/s, 600/s and 790/s; not at 850/s; "
        "undecided at 820/s (612 requests, 5 not in time; 695 more would decide if none is late); "
        "no verdict at 900/s, where the client sent late"
    )
    assert least_sent(5) == 612 + 695
    assert sentence("", []) == ""


def test_neighbours_are_drawn_together() -> None:
    good, bad = judge(3000, 0), judge(3000, 300)
    steps = [(f"{i}x", bad if i in (0, 5) else good) for i in range(12)]
    assert sentence("", steps).endswith("at 1x to 4x and 6x to 11x; not at 0x and 5x")


def test_a_day_of_short_steps_is_still_a_sentence() -> None:
    good, few = judge(3000, 0), judge(100, 0)
    steps = [(f"minute {i}", few if i % 2 else good) for i in range(1440)]
    text = sentence("", steps)
    assert len(text) < 500
    assert (
        "at minute 0, minute 2, " in text
        and "minute 22 and 708 more; undecided at minute 1, " in text
    )


# ---------------------------------------------------------------------------------------- results


def step(**changed: object) -> StepResult:
    base = StepResult(
        index=0,
        slo="300/s",
        group="",
        slo_factor=0.0,
        slo_ns=25 * NS_PER_MS,
        duration_ns=NS_PER_S,
        sent=1000,
        in_time=1000,
        met=1000,
        codes={"ok": 1000},
        latency_p50_ns=NS_PER_MS,
        latency_p99_ns=2 * NS_PER_MS,
        issue_delay_p50_ns=0,
        issue_delay_p99_ns=0,
        latency_p99_bound_ns=3 * NS_PER_MS,
    )
    return replace(base, **changed)  # type: ignore[arg-type]


def result(*steps: StepResult) -> RunResult:
    return RunResult(
        workload="w",
        steps=steps,
        complete=True,
        problem="",
        issue_delay_p50_ns=0,
        issue_delay_p99_ns=0,
        inputs=False,
        random_weights=False,
        elapsed_ns=1,
    )


def test_a_p99_of_661_answers_is_not_told() -> None:
    enough, few = step(codes={"ok": 662}), step(codes={"ok": 661, "timed out": 339})
    assert enough.claimed_p99_ns == 2 * NS_PER_MS and few.claimed_p99_ns is None
    table = run_table(result(few)).splitlines()[1]
    assert "n<662" in table and "2ms" not in table
    assert "2ms" in run_table(result(enough))
    assert "  -  " in run_table(result(step(codes={}, in_time=0, latency_p50_ns=0)))
    assert result(few).as_dict()["steps"][0]["latency_p99_claimed_ns"] is None


def test_the_table_says_yes_no_or_how_many_more() -> None:
    rows = run_table(
        result(
            step(),
            step(index=1, in_time=500),
            step(index=2, sent=100, in_time=100),
            step(index=3, issue_delay_p99_ns=3 * NS_PER_MS),
        )
    ).splitlines()
    for row, words in zip(rows[1:], ("yes", "no", "undecided: 359 more", "sent late"), strict=True):
        assert f"  {words}  " in row


def test_a_sweep_of_rates_names_the_highest_that_holds() -> None:
    swept = result(
        step(),
        step(index=1, slo="600/s"),
        step(index=2, slo="900/s", in_time=700),
    )
    assert swept.slo_verdict == (
        "SLO 25ms: 99 % in time (client), with 99 % confidence: at 300/s and 600/s; not at 900/s. "
        "The highest rate that holds: 600/s"
    )
    none = result(step(in_time=0), step(index=1, slo="600/s", in_time=0))
    assert none.slo_verdict.endswith("not at 300/s and 600/s. No rate is known to hold")


def test_a_sweep_of_slos_has_no_rate_to_name() -> None:
    swept = result(
        step(slo="1x", slo_factor=1.0, in_time=0), step(index=1, slo="2x", slo_factor=2.0)
    )
    assert swept.slo_verdict == "99 % in time (client), with 99 % confidence: at 2x; not at 1x"
    assert result().slo_verdict == ""


def test_the_document_has_the_verdicts_and_is_read_back() -> None:
    swept = result(step(), step(index=1, sent=100, in_time=100))
    document = json.loads(json.dumps(swept.as_dict()))
    assert document["slo_verdict"] == swept.slo_verdict
    assert [s["holds"]["outcome"] for s in document["steps"]] == ["holds", "undecided"]
    assert document["steps"][1]["holds"]["needs_more_if_none_late"] == 359
    assert RunResult.from_dict(document) == swept


def test_runs_of_a_step_are_judged_together() -> None:
    few = step(sent=300, in_time=300)
    alone, both = few.holds, pooled_verdict([few, few])
    assert alone is not None and alone.outcome is Outcome.UNDECIDED
    assert both is not None and (both.outcome, both.sent) == (Outcome.HOLDS, 600)
    assert pooled_verdict([few, step(issue_delay_p99_ns=NS_PER_S)]) is None


def test_sends_may_be_late_by_a_hundredth_of_the_slo_and_by_2_ms_at_least() -> None:
    assert issue_delay_bound_ns(0) == issue_delay_bound_ns(25 * NS_PER_MS) == 2 * NS_PER_MS
    late = 100 * NS_PER_MS
    five, fifteen = (
        step(slo_ns=seconds * NS_PER_S, issue_delay_p99_ns=late) for seconds in (5, 15)
    )
    assert five.sent_late and five.holds is None
    assert not fifteen.sent_late and fifteen.holds is not None
    run = replace(result(fifteen), issue_delay_p99_ns=late)
    assert run.verdict == "valid: issue delay p99 100ms, bound 150ms"
    assert run.as_dict()["issue_delay_bound_ns"] == 150 * NS_PER_MS
    # The smallest SLO counts for the whole run.
    both = replace(result(five, fifteen), issue_delay_p99_ns=late)
    assert not both.valid and "above its bound of 50ms" in both.verdict


def test_the_bound_of_a_step_is_one_of_its_latencies() -> None:
    workload = parse_workload("rate-list", ["m", "1", "poisson", "25ms", "100", "1"])
    tally = StepTally()
    tally.sent = tally.in_time = 1000
    tally.codes = {0: 1000}
    tally.latencies = array("q", range(1000, 0, -1))
    [got] = run_result(workload, Engine(workload), [tally], elapsed_ns=1).steps
    rank = rank_of_bound(1000)
    assert rank is not None and got.latency_p99_bound_ns == rank + 1 > got.latency_p99_ns
    tally.latencies = array("q", range(661))
    [few] = run_result(workload, Engine(workload), [tally], elapsed_ns=1).steps
    assert few.latency_p99_bound_ns == 0


def test_a_simulated_sweep_says_at_which_rates_it_holds(tmp_path: object) -> None:
    words = ["rate-list", "resnet50_v2", "1", "poisson", "25ms", "300,1500", "3", "--gpus", "1"]
    done = CliRunner().invoke(app, ["simulate", "INFER5", *words, "--out", f"{tmp_path}/run"])
    assert done.exit_code == 0, done.output
    assert "at 300/s; not at 1500/s. The highest rate that holds: 300/s" in done.stdout
    rows = [
        line.split()
        for line in done.stdout.splitlines()
        if line.lstrip().startswith(("300/s", "1500/s"))
    ]
    assert [row[5] for row in rows] == ["yes", "no"]
