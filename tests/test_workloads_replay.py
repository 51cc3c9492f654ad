"""replay: every request of a log once more, with its gaps, users and SLOs."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from arrival_statistics import drain
from slosched.errors import InvalidConfig
from slosched.telemetry.client_log import HEADER as CLIENT_HEADER
from slosched.telemetry.client_log import ClientRecord, format_client
from slosched.telemetry.request_log import COLUMNS, HEADER
from slosched.units import NS_PER_S
from slosched.workloads import parse_workload
from slosched.workloads.base import ModelUse, Step

WALL_NS = 1_700_000_000 * NS_PER_S


def request_row(arrival_ns: int, latency_ns: int, model: int, user: int, slo: str) -> str:
    factor, _, deadline = slo.partition("/")
    values = dict.fromkeys(COLUMNS, "0") | {
        "t": str(arrival_ns + latency_ns),
        "latency": str(latency_ns),
        "user_id": str(user),
        "model_id": str(model),
        "slo_factor": factor,
        "deadline": deadline,
    }
    return "\t".join(values.values())


def test_a_request_log_is_sent_as_it_arrived(tmp_path: Path) -> None:
    draws = random.Random(1)
    arrivals_ns = [WALL_NS]
    for _ in range(400):
        arrivals_ns.append(arrivals_ns[-1] + draws.randrange(0, 20_000_000))
    rows = [
        (arrival_ns, draws.randrange(1, 50_000_000), draws.choice((7, 40, 3)), draws.randrange(5))
        for arrival_ns in arrivals_ns
    ]
    # The log is in the order of the answers.
    answered = sorted(rows, key=lambda row: row[0] + row[1])
    log = tmp_path / "clockwork_request_log.tsv"
    log.write_text(
        "\n".join([HEADER, *(request_row(*row, "2.5/7000000") for row in answered)]) + "\n"
    )
    workload = parse_workload("replay", [str(log)])
    assert workload.models() == (ModelUse("resnet50_v2", 3),)
    assert "401 requests" in workload.describe()
    sent = drain(workload)
    assert len(sent) == 401
    assert [a.at_ns for a in sent] == [arrival_ns - WALL_NS for arrival_ns in arrivals_ns]
    instance_of = {3: 0, 7: 1, 40: 2}
    assert Counter((a.at_ns, a.instance, a.user_id) for a in sent) == Counter(
        (arrival_ns - WALL_NS, instance_of[model], user) for arrival_ns, _, model, user in rows
    )
    assert {(a.slo_factor, a.slo_ns) for a in sent} == {(2.5, 0)}
    assert workload.duration_ns == (sent[-1].at_ns // NS_PER_S + 1) * NS_PER_S


def test_a_client_log_is_sent_as_it_was_due(tmp_path: Path) -> None:
    def record(at_ns: int, slo_factor: float, slo_ns: int) -> str:
        return format_client(
            ClientRecord(WALL_NS + at_ns, 77, 5000, 1, 9, 2, slo_factor, slo_ns, 0, True)
        )

    log = tmp_path / "client_log.tsv"
    rows = [record(30, 1.5, 900), record(10, 0.0, 800), record(10, 0.0, 0), record(90, 2.0, 700)]
    log.write_text("\n".join([CLIENT_HEADER, *rows]) + "\n")
    sent = drain(parse_workload("replay", [str(tmp_path), "m"]))  # the run's directory
    assert [a.at_ns for a in sent] == [0, 0, 20, 80]
    assert [(a.slo_factor, a.slo_ns) for a in sent] == [(0.0, 800), (0.0, 0), (1.5, 0), (2.0, 0)]
    assert {(a.user_id, a.instance) for a in sent} == {(9, 0)}


def test_a_speed_shortens_the_gaps_and_leaves_the_slos(tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    times = [0, 10**9, 25 * 10**8, 7 * 10**9]
    rows = [request_row(WALL_NS + t, 5, 1, 0, "0/25000000") for t in times]
    log.write_text("\n".join([HEADER, *rows]) + "\n")
    workload = parse_workload("replay", [str(log), "m", "4"])
    sent = drain(workload)
    assert [b.at_ns - a.at_ns for a, b in pairwise(sent)] == [
        250_000_000,
        375_000_000,
        1_125_000_000,
    ]
    assert {a.slo_ns for a in sent} == {25_000_000}
    assert workload.duration_ns == 2 * NS_PER_S and workload.steps() == (Step(0, 0),)


def test_a_changed_log_is_read_anew(tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    row = request_row(WALL_NS, 5, 1, 0, "0/1")
    for count in (1, 3):
        log.write_text("\n".join([HEADER, *[row] * count]) + "\n")
        assert len(drain(parse_workload("replay", [str(log)]))) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: this is the header of no request log"),
        ("t\trequest_id\n1\t2\n", "line 1: this is the header of no request log"),
        (HEADER + "\n", "holds no requests"),
        (HEADER + "\n" + request_row(9, 5, 1, 0, "0/1"), "holds no requests"),  # no newline
        (HEADER + "\n" + request_row(9, 5, 1, 0, "0/1") + "\n1\t2\n", "line 3: 2 columns"),
        (
            HEADER + "\n" + request_row(9, 5, 1, 0, "0/soon") + "\n",
            "line 2: column deadline: 'soon'",
        ),
        (HEADER + "\n" + request_row(2**70, 5, 1, 0, "0/1") + "\n", "line 2: column t: 11805"),
        (HEADER + "\n" + request_row(9, 2**64, 1, 0, "0/1") + "\n", "line 2: column t: 18446"),
        (HEADER + "\n" + request_row(9, 5, 2**63, 0, "0/1") + "\n", "line 2: column model_id: 92"),
        (
            HEADER + "\n" + request_row(9, 5, 1, -(2**63), "0/1") + "\n",
            "line 2: column user_id: -9",
        ),
        (
            HEADER + "\n" + request_row(9, 5, 1, 0, f"0/{2**63}") + "\n",
            "line 2: column deadline: 92",
        ),
        (
            HEADER + "\n" + request_row(9, 5, 1, 0, f"0/{'9' * 5000}") + "\n",
            "line 2: column deadline",
        ),
        (
            HEADER + "\n" + request_row(-(2**62) + 9 - 99, 99, 1, 0, "0/1") + "\n",
            "line 2: columns t and latency: it arrived at -46",
        ),
        (HEADER + "\n" + request_row(9, 5, 1, 0, "nan/1") + "\n", "line 2: the SLO factor is nan"),
        (HEADER + "\n" + request_row(9, 5, 1, 0, "-2/1") + "\n", "line 2: the SLO factor is -2"),
    ],
)
def test_a_malformed_log_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    log = tmp_path / "log.tsv"
    log.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        parse_workload("replay", [str(log)])
    assert words in str(caught.value) and str(log) in str(caught.value)


def test_a_speed_that_takes_ages_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    rows = [request_row(t, 5, 1, 0, "0/1") for t in (0, NS_PER_S)]
    log.write_text("\n".join([HEADER, *rows]) + "\n")
    with pytest.raises(InvalidConfig, match="speed 1e-300 makes of 1s more than 146 years"):
        parse_workload("replay", [str(log), "m", "1e-300"])


def test_what_is_no_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"neither client_log\.tsv nor clockwork_request_log"):
        parse_workload("replay", [str(tmp_path)])
    with pytest.raises(InvalidConfig, match="cannot read the log"):
        parse_workload("replay", [str(tmp_path / "gone.tsv")])
    with pytest.raises(InvalidConfig, match="speed must be above 0"):
        parse_workload("replay", [str(tmp_path / "gone.tsv"), "m", "0"])


# ----------------------------------------------------------------------------------- a CSV


def csv_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "arrivals.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_of_arrivals_is_sent_as_it_says(tmp_path: Path) -> None:
    # Other columns and orders, quotes, Windows' line ends and byte order mark, rows out of order.
    path = csv_file(
        tmp_path,
        '\ufeffslo,who,Timestamp,model\r\n25ms,"a, b",100.5,bert\r\n,x,100,resnet\r\n0.1,y,100.25,bert\r\n',
    )
    workload = parse_workload("replay", [str(path), "recorded"])
    assert workload.models() == (ModelUse("bert"), ModelUse("resnet"))
    sent = drain(workload)
    assert [(a.at_ns, a.instance, a.slo_ns) for a in sent] == [
        (0, 1, 0),
        (250_000_000, 0, 100_000_000),
        (500_000_000, 0, 25_000_000),
    ]
    other = parse_workload("replay", [str(path), "resnet50_v2"])
    assert other.models() == (ModelUse("resnet50_v2", 2),)


def test_a_csv_needs_no_more_than_timestamps_and_takes_dates(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "timestamp\n2026-01-31T12:00:00Z\n2026-01-31T13:00:00.250+01:00\n")
    workload = parse_workload("replay", [str(path)])
    assert workload.models() == (ModelUse("resnet50_v2", 1),)
    assert [a.at_ns for a in drain(workload)] == [0, 250_000_000]
    with pytest.raises(InvalidConfig, match="names no model for each request"):
        parse_workload("replay", [str(path), "recorded"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("timestamp\nsoon\n", "line 2: column timestamp: 'soon' is neither a number of seconds"),
        ("timestamp\nnan\n", "line 2: column timestamp: 'nan' is out of range"),
        ("timestamp,slo\n1,fast\n", "line 2: column slo"),
        ("timestamp,slo\n1,0\n", "line 2: column slo: '0' is too short"),
        ("timestamp,slo\n1\n", "line 2: 1 columns, but the header has 2"),
        ("timestamp,timestamp\n1,2\n", "the column timestamp is there twice"),
        ("timestamp\n", "holds no requests"),
        ("time,model\n1,x\n", "nor that of a CSV with a column timestamp"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_with_its_line(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(InvalidConfig, match=words.replace("(", r"\(")):
        parse_workload("replay", [str(csv_file(tmp_path, text))])
