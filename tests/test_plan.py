"""`slosched plan`: the interval, the search, and small plans that are simulated."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from slosched.analysis.plan import plan_text, plot_plan, read_plan
from slosched.cli.app import app
from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunResult, StepResult
from slosched.sim.plan import BLOCKS, PlanSpec, hopeless, plan, point_of
from slosched.sim.plan_search import (
    Block,
    Judged,
    conclude,
    least_requests,
    next_number,
    share_of,
    student95,
    wilson,
)
from slosched.sim.spec import SimSpec
from slosched.workloads.mix import MixEntry, mix

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "workloads" / "plan-example.toml"
MS = 1_000_000
S = 1_000_000_000

# ---------------------------------------------------------------------------------- intervals


def test_wilson_and_student_against_published_values() -> None:
    # Newcombe (1998), Table I: 81 of 263 and 15 of 148 by Wilson's score method.
    assert wilson(81 / 263, 263, 1.959964) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15 / 148, 148, 1.959964) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0.0, 20, 1.959964) == pytest.approx((0.0, 0.1611), abs=5e-5)
    tables = {9: 2.262, 14: 2.145, 19: 2.093, 29: 2.045, 120: 1.980}
    for degrees, quantile in tables.items():
        assert student95(degrees) == pytest.approx(quantile, abs=0.002)
    assert student95(8) == pytest.approx(2.306, abs=0.01)


def test_misses_that_come_together_widen_the_interval() -> None:
    apart = share_of([Block(1000, 990)] * 20)
    together = share_of([Block(1000, 1000)] * 19 + [Block(1000, 800)])
    assert apart.point == together.point == 0.99
    assert apart.design_effect == 1.0
    # 20/19 of the sum of squares around 990, over the binomial variance of 20,000 requests.
    spread = 20 / 19 * (19 * 10**2 + 190**2)
    assert together.design_effect == pytest.approx(spread / (20_000 * 0.99 * 0.01))
    assert together.low < apart.low - 0.01 < apart.point < apart.high < together.high


def test_the_interval_covers_what_it_says_under_bursts() -> None:
    """Blocks with a miss probability of their own: nine in ten intervals or more hold the true share."""
    draw = random.Random(7)
    held = 0
    for _ in range(400):
        blocks = []
        for _ in range(30):
            miss = 0.04 if draw.random() < 0.25 else 0.0
            blocks.append(Block(500, sum(draw.random() >= miss for _ in range(500))))
        share = share_of(blocks)
        held += share.low <= 0.99 <= share.high
    assert held / 400 > 0.9


@given(st.floats(0.5, 0.9999), st.integers(10, 60))
def test_the_least_number_of_requests_is_just_enough(target: float, blocks: int) -> None:
    need = least_requests(target, blocks)
    assert wilson(1.0, need, student95(blocks - 1))[0] >= target - 1e-12
    if need > 1:
        assert wilson(1.0, need - 1, student95(blocks - 1))[0] < target + 1e-12


# ------------------------------------------------------------------------------------- search


def search(
    truth: dict[int, Judged], *, low: int, high: int, target: float, guess: int
) -> dict[int, Judged]:
    """Every number that the search asks for, with what is true of it."""
    known: dict[int, Judged] = {}
    while (
        number := next_number(known, low=low, high=high, target=target, guess=guess)
    ) is not None:
        assert low <= number <= high
        assert number not in known
        known[number] = truth[number]
    return known


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int, int]:
    low = draw(st.integers(1, 40))
    high = draw(st.integers(low, low + 120))
    return low, high, draw(st.integers(1, 200))


@given(ranges(), st.integers(1, 170), st.integers(0, 3))
def test_the_search_finds_the_smallest_of_a_monotone_curve(
    limits: tuple[int, int, int], enough: int, wide: int
) -> None:
    low, high, guess = limits
    # The point estimate gets there `wide` GPUs before the lower bound does.
    truth = {
        n: Judged(0.995 if n >= enough else 0.5, 0.996 if n + wide >= enough else 0.6, 1.0)
        for n in range(low, high + 1)
    }
    known = search(truth, low=low, high=high, target=0.99, guess=guess)
    verdict = conclude(known, low=low, high=high, target=0.99)
    assert verdict.gpus == (max(enough, low) if enough <= high else None)
    first = max(enough - wide, low)
    assert verdict.gpus_by_point == (first if first <= high else None)
    # The steps up grow by half, each of two bisections halves, and two neighbours are looked at.
    assert len(known) <= math.log(high + 1, 1.5) + 2 * math.log2(high - low + 2) + 6
    if verdict.gpus is not None:
        for neighbour in (verdict.gpus - 1, verdict.gpus + 1):
            assert neighbour in known or not low <= neighbour <= high


@given(ranges(), st.data())
def test_the_search_ends_and_is_right_about_what_it_saw_on_any_curve(
    limits: tuple[int, int, int], data: st.DataObject
) -> None:
    low, high, guess = limits
    shares = st.floats(0, 1)
    truth = {
        n: Judged(*sorted(data.draw(st.tuples(shares, shares, shares))))
        for n in range(low, min(high, low + 25) + 1)
    }
    high = max(truth)
    known = search(truth, low=low, high=high, target=0.6, guess=guess)
    verdict = conclude(known, low=low, high=high, target=0.6)
    if verdict.gpus is None:
        assert high in known and all(judged.low < 0.6 for judged in known.values())
    else:
        assert truth[verdict.gpus].low >= 0.6
        assert verdict.gpus == low or truth[verdict.gpus - 1].low < 0.6
        short = [n for n in known if n > verdict.gpus and known[n].low < 0.6]
        assert any("fell short" in doubt for doubt in verdict.doubts) == bool(short)


def test_numbers_that_contradict_each_other_are_named() -> None:
    known = {
        4: Judged(0.5, 0.6, 0.7),
        5: Judged(0.991, 0.995, 0.999),
        6: Judged(0.8, 0.85, 0.9),
    }
    verdict = conclude(known, low=5, high=9, target=0.99)
    assert verdict.gpus == 5
    noise, below, worse = verdict.doubts
    assert noise.startswith("6 GPUs fell short although 5 sufficed")
    assert below.startswith("fewer than 5 GPUs were not tried")
    assert worse.startswith("6 GPUs did worse than 5, beyond what chance explains")


# -------------------------------------------------------------------------------------- plans


def spec_of(*entries: MixEntry, **more: object) -> PlanSpec:
    base = SimSpec(
        mix(entries, S), SchedulerConfig(policy="INFER5"), (load_profile("v100"),), gpus=1
    )
    values: dict[str, object] = {
        "target": 0.95,
        "high": 8,
        "seeds": 2,
        "duration_ns": S // 2,
        "warmup_ns": S // 4,
    }
    return PlanSpec(entries, base, **(values | more))  # type: ignore[arg-type]


#: Two GPUs do not carry it: each batch of 8 takes 9.1 ms, so that a GPU serves 880/s at most.
BUSY = MixEntry("resnet50_v2", 2, 2000.0, (0.0, 25 * MS))


def test_a_plan_finds_the_number_and_goes_on_where_it_was(tmp_path: Path) -> None:
    spec = spec_of(BUSY)
    tried: list[int] = []
    answer = plan(spec, out=tmp_path, on_point=lambda point: tried.append(point.gpus))
    assert answer.complete
    assert answer.verdict.gpus == answer.verdict.gpus_by_point == 3
    assert sorted(tried) == [2, 3, 4] == [point.gpus for point in answer.points]
    shares = {point.gpus: point.share for point in answer.points}
    assert shares[2].high < 0.95 <= shares[3].low
    # What was sent in the warm-up does not count.
    assert abs(shares[3].sent - 2000 * 0.5 * 2) < 6 * math.sqrt(2000)
    document = read_plan(tmp_path)
    assert document == json.loads(json.dumps(answer.as_dict()))
    # Again: every run is read back.
    logs = sorted(tmp_path.rglob("*.tsv"))
    before = [(path, path.stat().st_mtime_ns) for path in logs]
    assert plan(spec, out=tmp_path).as_dict() == answer.as_dict()
    assert [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*.tsv"))] == before


def test_each_model_may_be_asked_to_reach_the_target() -> None:
    """A tenth of the requests has an SLO that is missed now and then: all together do not show it."""
    entries = (BUSY, MixEntry("resnet50_v2", 1, 200.0, (0.0, 5 * MS)))
    together = plan(spec_of(*entries, target=0.9, high=6))
    each = plan(spec_of(*entries, target=0.9, high=6, each_model=True))
    assert together.verdict.gpus is not None
    assert each.verdict.gpus is None or each.verdict.gpus > together.verdict.gpus
    point = together.points[0]
    assert point.judged(True).point == min(share.point for share in point.models)
    assert point.share.sent == sum(share.sent for share in point.models)


def test_an_slo_below_the_exec_time_is_hopeless_and_nothing_is_simulated(tmp_path: Path) -> None:
    fine = MixEntry("resnet50_v2", 1, 900.0, (0.0, 25 * MS))
    short = MixEntry("resnet50_v2", 1, 100.0, (0.0, 3 * MS))
    answer = plan(spec_of(fine, short), out=tmp_path)
    assert answer.verdict.gpus is None and answer.points == () and answer.complete
    (why,) = answer.why_none
    # 2.6 ms and four latencies of 0.2 ms.
    assert why.startswith("resnet50_v2 #2: its SLO of 3ms is below 3.4ms, which one request alone")
    # A share that may be missed is no reason, unless each model counts.
    assert hopeless(spec_of(fine, short, target=0.85)) == []
    assert hopeless(spec_of(fine, short, target=0.85, each_model=True)) == [why]
    # Exec times that vary may be shorter.
    spec = spec_of(short)
    noisy = replace(spec.base, noise=replace(spec.base.noise, exec_sigma=0.1))
    assert hopeless(replace(spec, base=noisy)) == []


def test_a_range_that_is_too_small_says_that_more_would_help() -> None:
    answer = plan(spec_of(BUSY, low=1, high=2))
    assert answer.verdict.gpus is None
    reached, more, codes = answer.why_none
    assert reached.startswith("even 2 GPUs reach only ")
    assert more == "more GPUs still help: look beyond 2 with --gpus"
    assert codes.startswith(f"of {answer.points[-1].share.sent} requests: ")


def test_a_flat_curve_says_that_more_gpus_do_not_help() -> None:
    """DIRECT sends everything to worker 0: the other GPUs stand idle."""
    spec = spec_of(BUSY, high=3)
    direct = replace(spec.base, scheduler=SchedulerConfig(policy="DIRECT"))
    answer = plan(replace(spec, base=direct))
    assert answer.verdict.gpus is None
    assert [point.gpus for point in answer.points] == [2, 3]
    assert answer.why_none[1].startswith("2 GPUs reach ")
    assert "so that more of them do not help" in answer.why_none[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"target": 1.0}, "the target must be above 0 and below 1, not 1"),
        ({"low": 3, "high": 2}, "the numbers of GPUs must ascend from 1, not 3..2"),
        ({"target": 0.9999}, "2000 requests cannot show a target of 0.9999: that takes 43"),
        ({"seeds": 0}, "seeds and duration must be above 0"),
    ],
)
def test_questions_that_cannot_be_answered(more: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        spec_of(BUSY, **more)
    assert words in str(caught.value)


def test_blocks_are_counted_by_step_and_model_without_the_warm_up() -> None:
    spec = spec_of(BUSY, MixEntry("resnet50_v2", 1, 10.0))

    def step(index: int, group: str, sent: int, in_time: int) -> StepResult:
        return StepResult(
            index=index,
            slo="",
            group=group,
            slo_factor=0.0,
            slo_ns=0,
            duration_ns=1,
            sent=sent,
            in_time=in_time,
            met=in_time,
            codes={"ok": in_time},
            latency_p50_ns=0,
            latency_p99_ns=0,
            issue_delay_p50_ns=0,
            issue_delay_p99_ns=0,
        )

    names = spec.workload().groups
    assert len(spec.workload().steps()) == BLOCKS + 1
    steps = (step(0, names[0], 99, 0), step(1, names[0], 10, 9), step(2, names[1], 5, 5))
    runs = [
        RunResult(
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
    ] * 2
    point = point_of(spec, 3, runs)
    assert (point.share.sent, point.share.in_time) == (30, 28)
    assert [(share.sent, share.in_time) for share in point.models] == [(20, 18), (10, 10)]
    assert point.by_seed == (14 / 15, 14 / 15)
    assert point.codes == {"ok": 28}


# ------------------------------------------------------------------------------------ command


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["plan", *args])


def test_the_documented_example_is_answered(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "plan"
    options = ["--models", str(EXAMPLE), "--out", str(out), "--seeds", "1", "--warmup", "0.2"]
    options += ["--target", "0.9", "--duration", "0.5", "--gpus", "3..6"]
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    assert "x v100 keep 90 % of all requests in time (95 % confidence, " in result.stdout
    assert sorted(path.name for path in out.glob("plan.*")) == ["plan.json", "plan.pdf", "plan.png"]
    said = json.loads(invoke(*options, "--json").stdout)
    assert said["gpus"] == read_plan(out)["gpus"] in range(3, 7)
    # A question that no number answers has an exit code of its own.
    result = invoke(*options, "--slo", "2ms")
    assert result.exit_code == 1
    assert "no number of GPUs within 3..6 is sure to keep 90 %" in result.stdout
    assert "its SLO of 2ms is below 3.4ms" in result.stdout


def test_wrong_options_are_named() -> None:
    for args, words in (
        (("--gpus", "many"), "--gpus 'many': write it as LOW..HIGH"),
        (("--policy", "INFER9"), "unknown scheduler TYPE 'INFER9'"),
        (("--rate", "-3"), "--rate must be"),
        (
            ("--slo", "soon"),
            "--slo must be a multiple of the exec time (2.9), a duration (10ms) or 0",
        ),
        (("--profile", "zoo61:2"), "planning takes one profile"),
        (("--faults", "random"), "failures are not modelled"),
        (("--policy", "ECHO"), "--policy ECHO: ECHO answers at once without running a model"),
        (("--policy", "DIRECT:paper"), "DIRECT is a test of workers, and uses only the first"),
        (("--policy", "STRESS"), "STRESS is a test of workers, and serves no clients"),
    ):
        result = invoke("--models", str(EXAMPLE), *args)
        assert result.exit_code == 2, (args, result.output)
        assert words in result.stderr


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted))
def test_the_table_never_rounds_a_miss_away(shares: list[float]) -> None:
    low, point, high = shares
    share = {"satisfaction": point, "low": low, "high": high}
    document = {
        "models": ["m"],
        "target": 0.99,
        "points": [
            {"gpus": 2, "sent": 10, **share, "judged": {"low": low, "point": point, "high": high}}
        ],
    }
    row = plan_text(document).splitlines()[1].split()
    assert (row[2] == "100") == (point == 1)
    assert float(row[2]) <= 100 * point


def test_a_plan_that_simulated_nothing_has_no_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidConfig, match="the plan simulated nothing"):
        plot_plan({"points": [], "target": 0.9}, tmp_path)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(InvalidConfig, match=r"plan\.json is not a plan"):
        read_plan(tmp_path)
