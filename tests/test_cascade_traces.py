"""cascade: prompts at the rates of a trace's name or of a file, the same again for the same seed."""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from arrival_statistics import assert_uniform, drain
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads import parse_workload, workload_from_table
from slosched.workloads.base import Arrival, ModelUse
from slosched.workloads.cascade_trace import (
    DAY_S,
    HIGHEST_S,
    LOWEST_S,
    PROMPTS,
    TRACES,
    CascadeTrace,
    Day,
    Double,
    Fixed,
    cascade_of,
    day_height,
    rates_named,
    read_prompts,
)
from slosched.workloads.cascades import load_cascade

OWN = Path(__file__).parent.parent / "workloads" / "cascades" / "my-cascade.toml"
SEEDS = range(5)


def trace(name: str, *more: str, cascade: str = "sdturbo") -> CascadeTrace:
    workload = parse_workload("cascade", [cascade, name, *more])
    assert isinstance(workload, CascadeTrace)
    return workload


def of_all_seeds(workload: CascadeTrace) -> list[list[Arrival]]:
    return [drain(workload, seed=seed) for seed in SEEDS]


def assert_counts(runs: list[list[Arrival]], workload: CascadeTrace, bin_s: int) -> None:
    """Hold each bin of each run, each bin of all runs and the whole to 5 standard deviations."""
    assert workload.rates is not None
    seconds = workload.rates.seconds
    means = [0.0] * math.ceil(seconds / bin_s)
    for start_ns, end_ns, rate in workload.rates.pieces():
        for second in range(start_ns // NS_PER_S, end_ns // NS_PER_S):
            means[second // bin_s] += rate
    together: Counter[int] = Counter()
    for run in runs:
        counts = Counter(arrival.at_ns // NS_PER_S // bin_s for arrival in run)
        assert sum(counts.values()) == pytest.approx(sum(means), abs=5 * sum(means) ** 0.5)
        together += counts
    for place, mean in enumerate(means):
        expected = mean * len(runs)
        assert abs(together[place] - expected) < 5 * expected**0.5 + 1


# ------------------------------------------------------------------------------------ requests


def test_each_request_is_for_the_cascade_with_its_slo() -> None:
    workload = trace("1to8", cascade="sdxlltn")
    assert workload.models() == (ModelUse("sdxlltn"),)
    assert workload.duration_ns == 347 * NS_PER_S and len(workload.steps()) == 1
    sent = drain(workload)
    assert {(a.instance, a.slo_factor, a.slo_ns, a.step, a.length) for a in sent} == {
        (0, 0.0, 15 * NS_PER_S, 0, 0)
    }
    assert all(0 <= a.at_ns < workload.duration_ns for a in sent)
    assert workload.describe() == (
        "cascade: prompts to sdxlltn, poisson between 1/s and 8/s on a day's curve, "
        "1 times as fast, SLO 15s, 347s in all"
    )


def test_the_seed_alone_decides_what_is_sent() -> None:
    workload = trace("2to10")
    first, again, other = drain(workload, seed=4), drain(workload, seed=4), drain(workload, seed=5)
    assert first == again == drain(pickle.loads(pickle.dumps(workload)), seed=4)
    assert [a.at_ns for a in first][:20] != [a.at_ns for a in other][:20]
    assert [a.user_id for a in first][:20] != [a.user_id for a in other][:20]
    # The prompts do not depend on the rates, so two traces ask for the same ones in order.
    assert [a.user_id for a in first][:500] == [
        a.user_id for a in drain(trace("3to40"), seed=4)[:500]
    ]


def test_prompts_are_uniform() -> None:
    counts = Counter(a.user_id for run in of_all_seeds(trace("3to40")) for a in run)
    assert min(counts) >= 1 and max(counts) <= PROMPTS == 4999
    bins = Counter((prompt - 1) * 50 // PROMPTS for prompt in counts.elements())
    expected = sum(counts.values()) / 50
    chi_square = sum((bins[place] - expected) ** 2 / expected for place in range(50))
    assert chi_square < 49 + 5 * (2 * 49) ** 0.5


def test_a_cascade_of_ones_own_gives_its_name_and_slo() -> None:
    workload = trace("fixed_20", cascade=str(OWN))
    assert workload.models() == (ModelUse("my-cascade"),)
    assert {a.slo_ns for a in drain(workload)} == {500 * NS_PER_MS}


def test_the_cascade_of_a_workload_is_found_also_where_it_is_cut_short() -> None:
    table = {"workload": "cascade", "cascade": "sdxs", "trace": "4to32", "duration": "20s"}
    short = workload_from_table(table)
    assert short.duration_ns == 20 * NS_PER_S
    assert cascade_of(short) == cascade_of(trace("1to8", cascade="sdxs")) == load_cascade("sdxs")
    assert cascade_of(parse_workload("simple", [])) is None


# --------------------------------------------------------------------------------------- rates


def test_the_curve_is_one_hump_and_then_a_fall() -> None:
    heights = [day_height(second) for second in range(DAY_S)]
    assert heights[LOWEST_S] == min(heights) == 0 and heights[HIGHEST_S] == max(heights) == 1
    falls = [b < a for a, b in pairwise(heights)]
    assert falls == [True] * 8 + [False] * 194 + [True] * 144
    assert max(abs(b - a) for a, b in pairwise(heights)) < 0.01
    # The artifact's mean rates are those of a mean height of 0.53 to 0.55.
    assert sum(heights) / DAY_S == pytest.approx(0.54, abs=0.01)


@pytest.mark.parametrize("name", ["1to8", "4to32", "3to40"])
def test_requests_come_at_the_rates_of_the_curve(name: str) -> None:
    workload = trace(name)
    runs = of_all_seeds(workload)
    assert_counts(runs, workload, 1)
    assert_counts(runs, workload, 10)


def test_the_rate_doubles_from_one_moment_to_the_next() -> None:
    workload = trace("double_8to16")
    assert workload.rates == Double(8, 16) and workload.duration_ns == 240 * NS_PER_S
    assert_counts(of_all_seeds(workload), workload, 5)
    (_, before_ns, low), (after_ns, end_ns, high) = workload.rates.pieces()
    assert (before_ns, after_ns, end_ns) == (120 * NS_PER_S, 120 * NS_PER_S, 240 * NS_PER_S)
    assert (low, high) == (8, 16) and trace("double:8to16").rates == workload.rates


def test_gaps_of_a_fixed_rate_are_exponential() -> None:
    workload = trace("fixed_20")
    runs = of_all_seeds(workload)
    assert_counts(runs, workload, 10)
    gaps_s = [(b.at_ns - a.at_ns) / NS_PER_S for run in runs for a, b in pairwise(run)]
    assert_uniform(1 - math.exp(-20 * gap) for gap in gaps_s)


def test_gaps_are_exponential_in_the_time_of_the_curve() -> None:
    """The integral of the rate up to each request rises by gaps of a Poisson process of rate 1."""
    workload = trace("4to32")
    assert workload.rates is not None
    pieces = workload.rates.pieces()
    before = [0.0]
    for _, _, rate in pieces:
        before.append(before[-1] + rate)
    for seed in SEEDS:
        work = []
        for arrival in drain(workload, seed=seed):
            second, rest_ns = divmod(arrival.at_ns, NS_PER_S)
            work.append(before[second] + pieces[second][2] * rest_ns / NS_PER_S)
        gaps = [b - a for a, b in pairwise([0.0, *work])]
        assert_uniform(1 - math.exp(-gap) for gap in gaps)


def test_the_speed_makes_the_same_requests_closer() -> None:
    slow, fast = trace("1to8"), trace("1to8", "2")
    assert fast.duration_ns == 174 * NS_PER_S and fast.rates == slow.rates
    pairs = list(zip(drain(slow), drain(fast), strict=True))
    assert all(b.at_ns == a.at_ns // 2 and a.user_id == b.user_id for a, b in pairs)
    assert {b.slo_ns for _, b in pairs} == {5 * NS_PER_S}
    for wrong in ("0", "-1", "nan", "1e7", "fast"):
        with pytest.raises(InvalidConfig, match="speed"):
            trace("1to8", wrong)


# --------------------------------------------------------------------------------------- names


def test_traces_are_named_as_in_the_artifact() -> None:
    for name in TRACES:
        low, high = (float(part.replace("_", ".")) for part in name.split("to"))
        assert rates_named(name) == Day(low, high)
        for spelled in (f"{name}qps", f"trace_{name}qps", f"trace_{name}qps.txt"):
            assert rates_named(spelled) == Day(low, high)
    assert rates_named("2.5to20") == Day(2.5, 20) and rates_named("5to50") == Day(5, 50)
    assert rates_named("fixed_20") == rates_named("trace_fixed_20qps.txt") == Fixed(20)
    assert rates_named("fixed_2_5") == Fixed(2.5)
    assert rates_named("4-32") is None


def test_the_misnamed_trace_is_what_its_requests_are() -> None:
    assert rates_named("3_5to40") == rates_named("trace_3_5to40qps.txt") == Day(3.5, 28)
    assert rates_named("3.5to40") == Day(3.5, 40)  # not the artifact's way to write it


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("4to320x", r"unknown trace '4to320x'.*; known: 1to8, .*double_8to16, fixed_20"),
        ("4-32", "unknown trace '4-32'"),
        ("32to4", "TRACE '32to4': the lower rate comes first"),
        ("0to4", "a rate in TRACE must be above 0"),
        ("fixed_0", "a rate in TRACE must be above 0"),
        ("double_8to0", "a rate in TRACE must be above 0"),
        ("fixed_9999999999", "a rate in TRACE must be above 0 and at most"),
        ("gone.txt", "cannot read the trace gone.txt"),
        ("none/4to32", "cannot read the trace none/4to32"),
        ("none/trace_4to32qps.txt", "cannot read the trace none/trace_4to32qps.txt"),
    ],
)
def test_what_is_no_trace_is_refused(name: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        trace(name)
    with pytest.raises(UnknownName, match="unknown cascade 'sdxl'"):
        trace("4to32", cascade="sdxl")


# --------------------------------------------------------------------------------------- files


def test_a_file_is_sent_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("2500.5,7\n0.0,4999\n100,3\n100,1\n")
    workload = trace(str(path))
    sent = drain(workload, seed=1)
    assert [(a.at_ns, a.user_id) for a in sent] == [
        (0, 4999),
        (100 * NS_PER_MS, 3),
        (100 * NS_PER_MS, 1),
        (2_500_500_000, 7),
    ]
    assert sent == drain(workload, seed=2) and workload.duration_ns == 3 * NS_PER_S
    assert f"4 prompts of {path} to sdturbo" in workload.describe()
    fast = trace(str(path), "10")
    assert [a.at_ns for a in drain(fast)] == [0, 10_000_000, 10_000_000, 250_050_000]
    assert fast.duration_ns == NS_PER_S
    assert pickle.loads(pickle.dumps(fast)) == fast


def test_a_file_may_end_its_lines_as_on_windows(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbf10.0,5\r\n\r\n5.0,6\r\n7,8")
    read = read_prompts(path)
    assert list(read.at_ns) == [5_000_000, 7_000_000, 10_000_000]
    assert list(read.prompts) == [6, 8, 5]


def test_a_file_with_the_name_of_a_trace_is_taken_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trace("trace_4to32qps.txt").rates == Day(4, 32)
    Path("trace_4to32qps.txt").write_text("5,1\n")
    assert len(drain(trace("trace_4to32qps.txt"))) == 1
    assert trace("4to32").rates == Day(4, 32)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("5,1\n")
    assert len(drain(trace(str(path)))) == 1
    path.write_text("5,1\n6,2\n")
    assert len(drain(trace(str(path)))) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": the trace holds no requests"),
        ("\n \n", ": the trace holds no requests"),
        ("5\n", ", line 1: 1 columns instead of 2, the milliseconds and the prompt id"),
        ("5,1\n6,1,2\n", ", line 2: 3 columns instead of 2"),
        ("5,1\n\nsoon,1\n", ", line 3: the milliseconds 'soon' are not a number"),
        ("5,1\n-1,1\n", ", line 2: the milliseconds must be within 0..1e.12, not -1"),
        ("nan,1\n", ", line 1: the milliseconds must be within 0..1e.12, not nan"),
        ("inf,1\n", ", line 1: the milliseconds must be within 0..1e.12, not inf"),
        ("5,one\n", ", line 1: the prompt id 'one' is not a whole number"),
        ("5,1.0\n", ", line 1: the prompt id '1.0' is a number that a spreadsheet rounded"),
        ("5,-1\n", r", line 1: the prompt id must be within 0..2\^31 - 1, not -1"),
        ("5,9999999999\n", ", line 1: the prompt id must be within"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=re.escape(str(path)) + words):
        trace(str(path))
