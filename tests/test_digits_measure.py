"""What is measured of the cascade of digits: distances, rules of routing, the report and the files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from slosched.cascade.digits.data import Part, as_stored
from slosched.cascade.digits.files import cascade_of, write_files
from slosched.cascade.digits.frechet import (
    Labelled,
    Matrix,
    Normal,
    bootstrap_error,
    frechet,
)
from slosched.cascade.digits.measure import measure
from slosched.cascade.digits.report import report_text, sample_rows, write_report
from slosched.cascade.digits.routing import (
    ERROR_ORACLE,
    GREEDY_ORACLE,
    JUDGE,
    RANDOM,
    RULES,
    Costs,
    Difference,
    accuracy,
    auc,
    correlation,
    first_of,
    order_of,
    paired_differences,
    quality,
)
from slosched.cascade.digits.served import Seen, Served, one_thread, serve
from slosched.workloads.cascades import load_cascade

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Tests run beside others: more threads would wait for one another."""
    with one_thread():
        yield


# ------------------------------------------------------------------------------------- distances


def test_the_distance_of_known_distributions() -> None:
    one = Normal(np.array([0.0, 1.0]), np.diag([1.0, 4.0]))
    other = Normal(np.array([3.0, 1.0]), np.diag([4.0, 1.0]))
    # |m - m'|^2 = 9; for diagonal covariances the rest is the sum of (s - s')^2.
    assert one.distance(other) == pytest.approx(9 + 1 + 1)
    assert one.distance(one) == pytest.approx(0, abs=1e-9)
    assert other.distance(one) == pytest.approx(one.distance(other))


def test_the_distance_does_not_change_under_a_rotation() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(300, 5)), random.normal(size=(200, 5)) * 2 + 1
    turn = np.linalg.qr(random.normal(size=(5, 5)))[0]
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b))
    singular = np.repeat(a[:, :1], 5, axis=1)
    assert math.isfinite(frechet(singular, b))


def test_fewer_vectors_are_farther_away_and_less_certain() -> None:
    random = np.random.default_rng(1)
    real = random.normal(size=(4000, 6))
    made = random.normal(size=(4000, 6))
    assert frechet(made[:60], real) > 3 * frechet(made, real)
    labels = np.arange(4000) % 2
    whole = Labelled(real, labels)
    few = bootstrap_error(Labelled(made[:60], labels[:60]), whole, repeats=30, seed=0)
    assert few > 2 * bootstrap_error(Labelled(made, labels), whole, repeats=30, seed=0)


def test_a_bootstrap_has_as_many_of_each_class() -> None:
    labels = np.array([0] * 7 + [1] * 3 + [5])
    drawn = Labelled(np.zeros((11, 1)), labels).drawn(np.random.default_rng(0))
    assert sorted(labels[drawn].tolist()) == labels.tolist()
    assert len(set(drawn.tolist())) < 11


def test_auc_and_correlation() -> None:
    low, high = np.array([0.1, 0.2, 0.2]), np.array([0.2, 0.9])
    pairs = [(h > x) + 0.5 * (h == x) for h in high for x in low]
    assert auc(high, low) == pytest.approx(sum(pairs) / 6)
    assert auc(high, high) == 0.5
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 4, 900])) == pytest.approx(1)
    assert correlation(np.array([1.0, 2, 3]), np.array([5.0, 5, 5])) == 0


# --------------------------------------------------------------------------------------- routing


def made_up(count: int = 400, seed: int = 0) -> Served:
    """Light answers, a half of which is bad, and scores that know which."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    bad = random.permutation(count) < count // 2
    real = random.normal(size=(300, 4))
    heavy = random.normal(size=(count, 4))
    light = np.where(bad[:, None], 3 + 0.2 * heavy, heavy + 0.01)

    def seen(features: Matrix, wrong: Any = False) -> Seen:
        classes = (np.arange(len(features)) + np.asarray(wrong)) % 10
        return Seen(features, classes, np.ones(len(features)))

    ink = np.zeros((count, 1, 8, 8), np.float32)
    return Served(
        labels=labels,
        light=ink,
        heavy=ink + 1,
        scores=np.where(bad, 0.2, 0.8) + 0.1 * random.random(count),
        heavy_scores=np.full(count, 0.9),
        real_scores=np.full(300, 0.95),
        real_part=Part(np.zeros((300, 1, 8, 8), np.float32), np.arange(300) % 10),
        light_seen=seen(light, bad),
        heavy_seen=seen(heavy),
        real=seen(real),
        learnt=seen(real + 0.1),
        learnt_labels=np.arange(300) % 10,
    )


def test_each_rule_orders_all_requests_and_knows_what_it_should() -> None:
    served = made_up()
    orders = {rule: order_of(rule, served) for rule in RULES}
    for order in orders.values():
        assert sorted(order.tolist()) == list(range(len(served)))
    at_half = {rule: quality(served, first_of(order, 0.5)) for rule, order in orders.items()}
    assert at_half[JUDGE] < 0.2 < at_half[RANDOM]
    assert at_half[ERROR_ORACLE] == pytest.approx(at_half[JUDGE])
    assert at_half[GREEDY_ORACLE] <= at_half[JUDGE] + 1e-3
    assert accuracy(served, first_of(orders[JUDGE], 0.5)) == 1
    assert accuracy(served, first_of(orders[JUDGE], 0.0)) == 0.5
    assert orders[RANDOM].tolist() != order_of(RANDOM, served, seed=1).tolist()


def test_the_greedy_oracle_is_never_far_behind_any_other_rule() -> None:
    served = made_up(seed=3)
    greedy = order_of(GREEDY_ORACLE, served)
    for share in (0.1, 0.3, 0.7):
        best = min(quality(served, first_of(order_of(rule, served), share)) for rule in RULES)
        assert quality(served, first_of(greedy, share)) <= best + 0.05


def test_the_difference_from_chance_has_a_paired_interval() -> None:
    served = made_up()
    by_chance = [order_of(RANDOM, served, seed=seed) for seed in range(3)]
    judge = order_of(JUDGE, served)
    at_each, mean = paired_differences(served, judge, by_chance, (0.3, 0.5), repeats=40, seed=0)
    for each in (*at_each, mean):
        assert each.low < each.value < each.high < 0
    assert mean.value == pytest.approx((at_each[0].value + at_each[1].value) / 2)
    same, _ = paired_differences(served, judge, [judge], (0.5,), repeats=5, seed=0)
    assert same == [Difference(0, 0, 0)]


def test_costs_run_the_light_program_first_or_not() -> None:
    costs = Costs(light_ms=1.0, heavy_ms=20.0)
    assert costs.mean_ms(0.25, light_first=True) == 6.0
    assert costs.mean_ms(0.25, light_first=False) == 5.75


# ---------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slosched.cascade.digits.measure._BOOTSTRAPS", 10)
        patch.setattr("slosched.cascade.digits.measure._HEAVY_REPEATS", 1)
        return measure(200)


def test_a_measurement_is_whole(measured: tuple[dict[str, Any], Served]) -> None:
    document, served = measured
    assert document["requests"] == len(served) == 200
    curves = document["curves"]
    for points in curves.values():
        assert [each["heavy_share"] for each in points] == [step / 10 for step in range(11)]
        assert points[0]["frechet"] == pytest.approx(document["ends"]["light"]["frechet"])
        assert points[-1]["frechet"] == pytest.approx(document["ends"]["heavy"]["frechet"])
    assert document["ends"]["heavy"]["accuracy"] > 0.95 < document["ends"]["real"]["accuracy"]
    scores = document["scores"]
    assert scores["deferred"][0] == 0 and scores["deferred"][-1] == 1
    half = scores["thresholds"].index(0.5)
    assert scores["deferred"][half] == pytest.approx((served.scores < 0.5).mean())
    assert document["judge"]["auc_real_light"] > 0.7


def test_serving_the_same_requests_gives_the_same_answers(
    measured: tuple[dict[str, Any], Served],
) -> None:
    again = serve(20)
    assert np.allclose(again.light, measured[1].light[:20], atol=1e-5)
    assert np.allclose(again.scores, measured[1].scores[:20], atol=1e-5)


def test_the_report_and_the_files_of_the_product(
    measured: tuple[dict[str, Any], Served], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    document, served = measured
    files, problem = write_report(document, served, tmp_path)
    assert not problem and {path.name for path in files} == {
        "report.json",
        "report.md",
        "digits.toml",
        "worker.toml",
        "curves.png",
        "samples.png",
    }
    text = (tmp_path / "report.md").read_text()
    assert text == report_text(document) and "Frechet distance (digits)" in text
    spec = load_cascade(tmp_path / "digits.toml")
    assert spec == cascade_of(document)
    assert spec.live_scores and spec.quality is not None and not spec.passes_output
    assert spec.quality.fid(0) == pytest.approx(document["ends"]["heavy"]["frechet"])
    assert spec.scores.share_below(spec.threshold) == pytest.approx(0.5, abs=0.02)
    assert (
        "no FID" not in text
        and "FIDs have other features" in (tmp_path / "digits.toml").read_text()
    )


def test_the_verdict_on_the_judge_follows_the_intervals(
    measured: tuple[dict[str, Any], Served],
) -> None:
    document = dict(measured[0])

    def verdict(low: float, high: float) -> str:
        entry = {"heavy_share": 0.5, "value": 0.0, "low": low, "high": high}
        changed = {"judge_less_random": [entry], "judge_less_random_mean": entry}
        return report_text({**document, **changed})

    assert "the judge is better than chance; it is better at 1 of 1" in verdict(-2, -1)
    assert "the judge is worse than chance; it is better at 0 of 1" in verdict(1, 2)
    assert "not shown to be better than chance" in verdict(-1, 1)


def test_pages_of_images_pair_both_programs(measured: tuple[dict[str, Any], Served]) -> None:
    served = measured[1]
    rows = sample_rows(served)
    names = [name for name, _ in rows]
    assert names.count("heavy, the same") == 2
    lowest = dict(rows)["light, lowest scores"]
    assert np.array_equal(lowest[0], as_stored(served.light)[served.scores.argmin()])


def test_an_slo_may_be_given(measured: tuple[dict[str, Any], Served], tmp_path: Path) -> None:
    spec = cascade_of(measured[0], slo_ns=250_000_000)
    write_files(spec, tmp_path)
    assert load_cascade(tmp_path / "digits.toml").slo_ns == 250_000_000
    default = cascade_of(measured[0]).slo_ns
    assert default > 0 and default % 10_000_000 == 0
