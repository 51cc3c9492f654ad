"""What the policies of cascades are made of: rates, quantiles, who is outranked; and their files."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from cascade_rig import CascadeRig
from scheduler_rig import MS, T0
from slosched.cascade_spec import CascadeOptions, ScoreCurve
from slosched.cli.app import app
from slosched.cli.values import cascades
from slosched.config_file import load_controller_config
from slosched.core.scheduler.arrival_rate import ALPHA, ArrivalRate
from slosched.core.scheduler.policies.cascade import CascadePolicy
from slosched.core.scheduler.recent_scores import KEPT, RecentScores
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_S

OWN = Path(__file__).parent.parent / "workloads" / "cascades" / "my-cascade.toml"


# --------------------------------------------------------------------------------------- rates


def direct_rate(arrivals_ns: list[int], now_ns: int) -> float:
    """The weighted mean over whole seconds from the first arrival on."""
    whole = (now_ns - arrivals_ns[0]) // NS_PER_S
    counts = [0] * whole
    for at_ns in arrivals_ns:
        second = (at_ns - arrivals_ns[0]) // NS_PER_S
        if second < whole:
            counts[second] += 1
    weights = [(1 - ALPHA) ** (whole - 1 - second) for second in range(whole)]
    return sum(w * n for w, n in zip(weights, counts, strict=True)) / sum(weights)


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_is_the_weighted_mean_of_the_seconds_since_the_first_arrival(seed: int) -> None:
    draw, rate = Random(seed), ArrivalRate()
    at_ns, arrivals = T0, list[int]()
    for _ in range(300):
        at_ns += round(draw.expovariate(8) * NS_PER_S) + (draw.random() < 0.02) * 7 * NS_PER_S
        rate.add(at_ns)
        arrivals.append(at_ns)
        if at_ns - arrivals[0] >= NS_PER_S:
            assert rate.per_s(at_ns) == pytest.approx(direct_rate(arrivals, at_ns))
    later_ns = at_ns + 12 * NS_PER_S + 1
    assert rate.per_s(later_ns) == pytest.approx(direct_rate(arrivals, later_ns))


def test_the_first_second_shows_what_it_has_seen() -> None:
    rate = ArrivalRate()
    assert rate.per_s(T0) == rate.soon_per_s(T0) == 0
    for _ in range(3):
        rate.add(T0)
    assert rate.per_s(T0) == 3
    assert rate.per_s(T0 + NS_PER_S) == 3


def test_a_jump_shows_within_its_second() -> None:
    rate = ArrivalRate()
    for second in range(10):
        rate.add(T0 + second * NS_PER_S)
    for _ in range(50):
        rate.add(T0 + 10 * NS_PER_S)
    now_ns = T0 + 10 * NS_PER_S + 1
    assert rate.per_s(now_ns) == pytest.approx(1) and rate.soon_per_s(now_ns) == 50


@pytest.mark.parametrize("looked_every_s", [0.25, 200])
def test_after_a_long_silence_the_rate_is_zero_however_often_it_is_asked(
    looked_every_s: float,
) -> None:
    rate = ArrivalRate()
    for place in range(100):
        rate.add(T0 + place * 50 * MS)
    now_ns = T0
    while now_ns < T0 + 100 * NS_PER_S:
        now_ns += round(looked_every_s * NS_PER_S)
        rate.per_s(now_ns)
    assert rate.per_s(now_ns) == 0
    rate.add(now_ns + NS_PER_S)
    assert 0 < rate.per_s(now_ns + 2 * NS_PER_S) <= 1


def test_a_controller_without_requests_is_left_asleep() -> None:
    for policy in ("CASCADE", "DIFFSERVE"):
        rig = CascadeRig(policy)
        rig.ask()
        rig.run("small", 0.9)
        now_ns = rig.now_ns
        assert rig.scheduler.policy.next_wakeup_ns() is not None
        while now_ns < T0 + 70 * NS_PER_S:
            now_ns += 250 * MS
            rig.now_ns = now_ns
            rig.beat()
            rig.step()
        assert rig.scheduler.policy.next_wakeup_ns() is None, policy


# -------------------------------------------------------------------------------------- scores


def test_quantiles_are_those_of_the_last_scores() -> None:
    draw, kept = Random(3), RecentScores(ScoreCurve((0.0, 1.0), (0.0, 1.0)))
    scores = [draw.betavariate(2, 5) for _ in range(3 * KEPT)]
    scores += [scores[0]] * 40  # equal ones
    for score in scores:
        kept.add(score)
    last = sorted(scores[-KEPT:])
    for share in (0.0, 0.001, 0.25, 0.5, 0.9, 0.999):
        threshold = kept.threshold_for(share)
        assert threshold == last[round(share * KEPT)]
        assert sum(score < threshold for score in last) <= share * KEPT + 1e-6
    assert kept.threshold_for(0) == last[0], "none is below"
    assert kept.threshold_for(1) > last[-1], "all are"
    assert kept.threshold_for(7) > last[-1]


def test_scores_begin_with_the_known_distribution_and_drift_away_from_it() -> None:
    curve = ScoreCurve((0.0, 0.2, 1.0), (0.0, 0.8, 1.0))
    kept = RecentScores(curve)
    for share in (0.1, 0.4, 0.8, 0.95):
        assert kept.threshold_for(share) == pytest.approx(curve.threshold_for(share), abs=0.004)
    thresholds = []
    for place in range(KEPT):
        kept.add(0.9 + 0.1 * (place % 10) / 10)
        thresholds.append(kept.threshold_for(0.5))
    assert thresholds == sorted(thresholds) and thresholds[-1] >= 0.9
    # What leaves first is spread over the distribution: halfway, half of the known ones are left.
    assert thresholds[KEPT // 4] < 0.25 and thresholds[KEPT * 3 // 5] >= 0.9


# ------------------------------------------------------------------------------------ outranked


def test_outranked_are_those_that_only_lower_scores_overtook() -> None:
    """Held against a plain list of what was sent since, over random sequences."""
    from types import SimpleNamespace

    draw = Random(9)
    rig = CascadeRig("CASCADE")
    policy = rig.scheduler.policy
    assert isinstance(policy, CascadePolicy)
    sent: list[tuple[int, float]] = []
    queue = SimpleNamespace(requests=[])
    seen = set()
    for now_ns in range(2_000):
        what = draw.random()
        if what < 0.4:
            score = round(draw.random(), 2)
            trail = (SimpleNamespace(score=score),)
            queue.requests.append(SimpleNamespace(queued_ns=now_ns, trail=trail, queue=queue))
        elif what < 0.7:
            score = round(draw.random() * 0.8, 2)
            while policy._sent and policy._sent[-1][1] <= score:
                policy._sent.pop()
            policy._sent.append((now_ns, score))
            sent.append((now_ns, score))
        elif queue.requests:
            request = queue.requests.pop(0)
            since = [s for at, s in sent if at >= request.queued_ns]
            expected = bool(since) and max(since) <= request.trail[-1].score
            assert policy._is_outranked(request) == expected
            seen.add((bool(since), expected))
    assert seen == {(True, True), (True, False), (False, False)}


# --------------------------------------------------------------------------------------- files


def controller(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "controller.toml"
    file.write_text(text)
    return file


def test_a_controllers_file_names_cascades_and_their_options(tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "mine.toml").write_text(OWN.read_text())
    text = (
        'cascades = ["sdturbo", "specs/mine.toml"]\n[scheduler]\nmax_gpus = 7\n'
        '[cascade]\nrouting = "random"\nplan_every_ns = 2_000_000_000\nqueue_term = false\n'
    )
    scheduler = load_controller_config(str(controller(tmp_path, text))).scheduler
    assert [each.name for each in scheduler.cascades] == ["sdturbo", "mine"]
    assert scheduler.cascade == CascadeOptions(
        routing="random", plan_every_ns=2 * NS_PER_S, queue_term=False
    )
    assert scheduler.max_gpus == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[cascade]\nroute = 1\n", "route"),
        ('[cascade]\nrouting = "round"\n', "routing"),
        ("[cascade]\nover_provision = 0.5\n", "over_provision"),
        ('cascades = "sdturbo"\n', "cascades"),
        ('cascades = ["sdturbo", "sdturbo"]\n', "a name of its own"),
        ('cascades = ["lost/none.toml"]\n', "none.toml"),
    ],
)
def test_what_is_wrong_with_it_is_said(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidConfig) as error:
        load_controller_config(str(controller(tmp_path, text)))
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["[cascade]\nroute = 1\n", "[cascade]\nover_provision = 0.5\n"])
def test_an_error_in_the_table_names_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidConfig, match=r"controller\.toml.*\[cascade\]"):
        load_controller_config(str(controller(tmp_path, text)))


def test_the_command_line_takes_names_and_files() -> None:
    assert [each.name for each in cascades(f"sdxs,{OWN}")] == ["sdxs", "my-cascade"]
    with pytest.raises(UnknownName, match="sdturbo"):
        cascades("sdturba")


def test_a_controller_of_one_cascade_without_any_says_what_to_give() -> None:
    result = CliRunner().invoke(app, ["controller", "CASCADE", "127.0.0.1:1"])
    assert result.exit_code != 0
    assert "--cascade sdturbo" in " ".join(result.output.split())
    result = CliRunner().invoke(
        app, ["controller", "INFER5", "127.0.0.1:1", "--cascade", "sdturba"]
    )
    assert result.exit_code != 0 and "sdturba" in result.output
