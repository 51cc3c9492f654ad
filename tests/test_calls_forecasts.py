"""Long and short calls, and forecasts that are wrong, in virtual time: none starves, none hopes for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from slosched.codes import Code
from slosched.core.worker.emulated_calls import EmulatedFunction, Run, Script
from slosched.messages import FunctionInfo
from slosched.sim.caller import Answered
from slosched.sim.calls import CallArrival, CallSpec, simulate_calls
from slosched.sim.hosts import HostPlan
from slosched.units import NS_PER_MS, NS_PER_S

MS, S = NS_PER_MS, NS_PER_S


def function(name: str, *durations_ns: int, expected_ns: int = MS) -> EmulatedFunction:
    scripts = tuple(Script((Run(each),)) for each in durations_ns)
    info = FunctionInfo(slo_ns=60 * S)
    return EmulatedFunction(name=name, scripts=scripts, info=info, expected_ns=expected_ns)


def calls(
    name: str, count: int, every_ns: int, slo_ns: int, *, from_ns: int = 0, number: int = 0
) -> list[CallArrival]:
    return [
        CallArrival(at_ns=from_ns + i * every_ns, function=name, slo_ns=slo_ns, number=number)
        for i in range(count)
    ]


def run(
    functions: Sequence[EmulatedFunction], arrivals: Sequence[CallArrival], slots: int = 2
) -> dict[str, list[Answered]]:
    hosts = (HostPlan(tuple(functions), slots=slots),)
    arrivals = tuple(sorted(arrivals, key=lambda each: each.at_ns))
    outcome = simulate_calls(CallSpec(hosts=hosts, arrivals=arrivals, settle_ns=120 * S))
    found: dict[str, list[Answered]] = {each.name: [] for each in functions}
    for each in sorted(outcome.answers, key=lambda each: each.arrival.at_ns):
        found[each.arrival.function].append(each)
    return found


def codes(answers: Sequence[Answered]) -> Counter[int]:
    return Counter(each.code for each in answers)


def test_short_calls_are_refused_at_once_while_long_ones_have_all_slots_and_then_served() -> None:
    functions = [function("long", 10 * S, expected_ns=10 * S), function("short", MS)]
    arrivals = calls("long", 2, MS, 60 * S)
    arrivals += calls("short", 100, 50 * MS, 50 * MS, from_ns=S)
    arrivals += calls("short", 100, 50 * MS, 50 * MS, from_ns=11 * S)
    short = run(functions, arrivals)["short"]
    during, later = short[:100], short[100:]
    assert codes(during) == {Code.COULD_NOT_START_IN_TIME: 100}
    assert max(each.answered_ns - each.sent_ns for each in during) < MS
    assert codes(later) == {0: 100}


def test_short_calls_with_patience_wait_for_long_ones_and_all_are_in_time() -> None:
    functions = [function("long", 10 * S, expected_ns=10 * S), function("short", MS)]
    arrivals = calls("long", 8, 5 * S, 60 * S) + calls("short", 400, 100 * MS, 30 * S)
    answers = run(functions, arrivals)
    assert codes(answers["long"]) == {0: 8} and codes(answers["short"]) == {0: 400}
    assert all(each.replies[0].deadline_met for each in answers["short"] + answers["long"])


def test_a_function_that_takes_much_longer_than_it_says_costs_others_little() -> None:
    """5 s where it says 1 ms, with an SLO of 1 s: a few teach that, and the others are refused at once."""
    functions = [function("liar", 5 * S), function("short", MS)]
    arrivals = calls("liar", 300, S, S) + calls("short", 3000, 100 * MS, 50 * MS)
    answers = run(functions, arrivals)
    assert codes(answers["liar"])[Code.COULD_NOT_START_IN_TIME] > 280
    assert codes(answers["short"])[0] > 0.93 * 3000
    later = [each for each in answers["liar"] if each.arrival.at_ns > 30 * S and not each.code]
    assert 0 < len(later) <= 270 // 50 + 1  # once in ten times what it takes


def test_a_function_that_says_far_too_much_is_tried_and_served_from_then_on() -> None:
    humble = function("humble", MS, expected_ns=5 * S)
    answers = run([humble], calls("humble", 900, 100 * MS, S))["humble"]
    refused = [each for each in answers if each.code]
    assert 0 < len(refused) < 550
    assert codes(answers[-300:]) == {0: 300}


def test_a_function_that_was_slow_and_is_quick_now_is_served_again() -> None:
    arrivals = calls("f", 20, 2 * S, 10 * S, number=1)
    arrivals += calls("f", 600, 100 * MS, 500 * MS, from_ns=60 * S)
    answers = run([function("f", MS, 2 * S)], arrivals)["f"]
    assert codes(answers[:20]) == {0: 20}
    assert codes(answers[-300:]) == {0: 300}


def test_a_host_with_one_slot_free_keeps_it_for_calls_that_have_hope() -> None:
    functions = [function("long", 100 * S, expected_ns=100 * S), function("liar", 5 * S)]
    arrivals = [
        *calls("liar", 4, 10 * S, S),
        *calls("long", 1, S, 200 * S, from_ns=60 * S),
        *calls("liar", 90, S, S, from_ns=61 * S),
    ]
    answers = run(functions, arrivals)["liar"][4:]
    assert codes(answers) == {Code.COULD_NOT_START_IN_TIME: 90}
