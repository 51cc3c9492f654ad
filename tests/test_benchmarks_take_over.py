"""What benchmarks/take_over.py counts. No process is started here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from take_over import SLO_NS, Sent, _answers, recovered_s

MS = 1_000_000
KILLED_NS = 10**18


def requests(first_ms: int, count: int, *, late: bool = False) -> list[Sent]:
    """`count` requests, one each millisecond, answered in 5 ms or never."""
    sent = [Sent(KILLED_NS + (first_ms + i) * MS) for i in range(count)]
    for each in sent:
        if late:
            each.lost = True
        else:
            each.answered_ns, each.code = each.sent_ns + 5 * MS, 0
    return sent


def test_requests_are_in_time_again_from_the_first_one_on_of_which_nearly_all_are() -> None:
    sent = requests(-50, 50) + requests(0, 2000, late=True) + requests(2000, 100)
    assert recovered_s(sent, KILLED_NS) == 2.0
    sent[2120].answered_ns += SLO_NS  # one of them is late
    assert recovered_s(sent, KILLED_NS) == 2.0


def test_a_few_answers_between_losses_are_no_recovery() -> None:
    sent = requests(0, 500, late=True) + requests(500, 20) + requests(520, 500, late=True)
    assert recovered_s(sent, KILLED_NS) == -1.0
    assert recovered_s([], KILLED_NS) == -1.0


def test_answers_are_counted_by_code() -> None:
    sent = requests(0, 3) + requests(3, 2, late=True)
    sent[0].code = 6
    assert _answers(sent) == "3 answered (2 ok, 1 invalid request)"
    assert _answers(requests(0, 1, late=True)) == "0 answered"
