"""The three TSV files, byte for byte, and back."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from slosched.codes import ActionType, Code
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.messages import Span
from slosched.telemetry import action_log, client_log, request_log
from slosched.telemetry.client_log import ClientRecord
from slosched.telemetry.table import LogTable, MalformedLog, header_of, read_table

GOLDEN = Path(__file__).parent / "golden"
SENT_NS = 1_598_832_443_000_000_000

REQUESTS = [
    # Clockwork's own sample row: model 30, 11.43 ms of 100 ms, a cold start.
    RequestRecord(
        key=1,
        request_id=68,
        user_id=357,
        model_id=30,
        code=0,
        reason="",
        slo_factor=0.0,
        slo_ns=100_000_000,
        arrival_ns=1_598_832_443_782_277_698,
        departure_ns=1_598_832_443_793_706_643,
        deadline_met=True,
        arrival_count=0,
        departure_count=2,
        cold=True,
    ),
    # Ok, but late, on a warm model; a factor with a fraction.
    RequestRecord(
        2, 69, 3, 4, 0, "", 2.25, 6_525_000, SENT_NS, SENT_NS + 7_000_001, False, 6, 6, False
    ),
    # Refused at arrival; a whole factor; loaded nowhere, so not a cold start.
    RequestRecord(
        3, 70, 0, 5, 8, "no plan", 30.0, 87_000_000, SENT_NS, SENT_NS, False, 0, 0, False
    ),
    # A factor that 1.5 ** 11 gives in full is written as a C++ stream would.
    RequestRecord(
        4, 71, 0, 5, 4, "", 1.5**11, 250_842_919, SENT_NS, SENT_NS + 9, False, 1, 0, False
    ),
    # No such model: it never had a deadline.
    RequestRecord(5, 72, 0, 99, 6, "", 0.0, 0, SENT_NS, SENT_NS + 5, False, 0, 0, False),
]

INFER = ActionRecord(
    action_id=7,
    action_type=ActionType.INFER,
    code=0,
    worker_id=1,
    gpu_id=3,
    model_id=12,
    batch_size=4,
    sent_ns=SENT_NS,
    expected_duration_ns=5_600_000,
    expected_start_ns=SENT_NS + 1_000_000,
    expected_complete_ns=SENT_NS + 6_600_000,
    result_received_ns=SENT_NS + 6_900_000,
    processed_ns=SENT_NS + 6_950_000,
    requests_queued=5,
    copies_loaded=6,
    goodput_ns=4_207_500,
    exec=Span(SENT_NS + 1_000_100, SENT_NS + 6_610_200, 5_610_000),
    copy_output_end_ns=SENT_NS + 6_650_000,
    worker_received_ns=SENT_NS + 200_000,
    worker_sent_ns=SENT_NS + 6_660_000,
    gpu_clock_expected_mhz=1380,
    gpu_clock_before_mhz=1380,
    gpu_clock_mhz=1377,
)
ACTIONS = [
    INFER,
    # A load: batch 1 whatever the record says, no output, no clocks of its own.
    ActionRecord(
        action_id=8,
        action_type=ActionType.LOAD_WEIGHTS,
        code=0,
        worker_id=0,
        gpu_id=0,
        model_id=2,
        batch_size=0,
        sent_ns=SENT_NS,
        expected_duration_ns=8_330_000,
        expected_start_ns=SENT_NS,
        expected_complete_ns=SENT_NS + 9_330_000,
        result_received_ns=SENT_NS + 9_500_000,
        processed_ns=SENT_NS + 9_500_000,
        requests_queued=1,
        copies_loaded=0,
        goodput_ns=8_330_000,
        exec=Span(SENT_NS + 1_000_000, SENT_NS + 9_330_000, 8_330_000),
        worker_received_ns=SENT_NS + 300_000,
        worker_sent_ns=SENT_NS + 9_340_000,
        gpu_clock_expected_mhz=1380,
    ),
    # An eviction: whatever was expected, zeros stand for it.
    ActionRecord(
        action_id=9,
        action_type=ActionType.EVICT_WEIGHTS,
        code=0,
        worker_id=0,
        gpu_id=0,
        model_id=1,
        batch_size=0,
        sent_ns=SENT_NS,
        expected_duration_ns=1_000,
        expected_start_ns=SENT_NS,
        expected_complete_ns=SENT_NS + 1_000,
        result_received_ns=SENT_NS + 600_000,
        processed_ns=SENT_NS + 600_000,
        requests_queued=0,
        copies_loaded=3,
        exec=Span(SENT_NS + 310_000, SENT_NS + 310_000, 0),
        worker_received_ns=SENT_NS + 300_000,
        worker_sent_ns=SENT_NS + 320_000,
        gpu_clock_expected_mhz=1380,
    ),
    # Failed: nothing ran, the clocks disagree by more than the message took; nothing is negative.
    replace(
        INFER,
        action_id=10,
        code=Code.EXEC_TOO_LATE,
        exec=Span(0, 0, 0),
        copy_output_end_ns=0,
        worker_received_ns=SENT_NS - 40_000,
        expected_complete_ns=SENT_NS - 1,
        goodput_ns=5,
        gpu_clock_before_mhz=0,
        gpu_clock_mhz=0,
    ),
]

CLIENTS = [
    ClientRecord(
        scheduled_ns=SENT_NS,
        issue_delay_ns=81_000,
        latency_ns=6_125_000,
        request_id=41,
        user_id=3,
        model_id=4,
        slo_factor=2.25,
        slo_ns=6_525_000,
        code=0,
        in_time=True,
        controller_latency_ns=5_900_000,
        deadline_met=True,
        batch_size=2,
        worker_id=1,
        gpu_id=3,
        cold=True,
        predicted_exec_ns=3_800_000,
        exec_ns=3_801_000,
    ),
    ClientRecord(
        SENT_NS + 1, -500, 12_000_000_000, 42, 0, 1, 0.0, 10_000_000, client_log.NO_ANSWER, False
    ),
]


def _lines(name: str) -> list[str]:
    text = (GOLDEN / name).read_bytes().decode("ascii")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def test_request_rows_are_the_golden_ones() -> None:
    rows = [request_log.HEADER, *map(request_log.format_request, REQUESTS)]
    assert rows == _lines("request_log.tsv")


def test_the_published_sample_row() -> None:
    sample = "1598832443793706643 68 0 357 30 0 11428945 100000000 1 0 2 1"
    assert request_log.format_request(REQUESTS[0]).split("\t") == sample.split(" ")


def test_action_rows_are_the_golden_ones() -> None:
    rows = [action_log.HEADER, *map(action_log.format_action, ACTIONS)]
    assert rows == _lines("action_log.tsv")


def test_client_rows_are_the_golden_ones() -> None:
    rows = [client_log.HEADER, *map(client_log.format_client, CLIENTS)]
    assert rows == _lines("client_log.tsv")


def test_published_column_counts() -> None:
    assert len(request_log.HEADER.split("\t")) == 12
    assert len(action_log.HEADER.split("\t")) == 23


def test_client_record_is_the_columns_field_for_field() -> None:
    assert list(ClientRecord.__struct_fields__) == list(client_log.COLUMNS)


@pytest.mark.parametrize("kind", [ActionType.LOAD_MODEL, ActionType.CLEAR_CACHE])
def test_other_actions_have_no_row(kind: ActionType) -> None:
    with pytest.raises(ValueError, match="has no row"):
        action_log.format_action(replace(INFER, action_type=kind))


def test_request_log_round_trip() -> None:
    table = request_log.read_request_log(GOLDEN / "request_log.tsv")
    assert (len(table), table.truncated) == (len(REQUESTS), 0)
    # Times must survive exactly: a float64 would lose the last two or three digits.
    assert table["t"].dtype == np.int64
    assert table["t"].tolist() == [r.departure_ns for r in REQUESTS]
    assert (table["t"] - table["latency"]).tolist() == [r.arrival_ns for r in REQUESTS]
    assert table["slo_factor"].tolist() == [0.0, 2.25, 30.0, 86.4976, 0.0]
    assert table["deadline"].tolist() == [100_000_000, 6_525_000, 87_000_000, 250_842_919, -1]


def test_action_log_round_trip() -> None:
    table = action_log.read_action_log(GOLDEN / "action_log.tsv")
    assert table["action_type"].tolist() == [2, 1, 3, 2]
    sent = table["t"] - table["controller_result_enqueue"]
    assert sent.tolist() == [SENT_NS] * 4


def test_client_log_round_trip() -> None:
    table = client_log.read_client_log(GOLDEN / "client_log.tsv")
    for name in client_log.COLUMNS:
        assert table[name].tolist() == [getattr(r, name) for r in CLIENTS], name


def _read(tmp_path: Path, data: bytes) -> LogTable:
    path = tmp_path / "log.tsv"
    path.write_bytes(data)
    return request_log.read_request_log(path)


GOOD = (GOLDEN / "request_log.tsv").read_bytes()


@pytest.mark.parametrize("cut", [1, 2, 9, 30])
def test_a_torn_last_line_is_dropped_and_counted(tmp_path: Path, cut: int) -> None:
    table = _read(tmp_path, GOOD[:-cut])
    assert (len(table), table.truncated) == (len(REQUESTS) - 1, 1)
    assert table["t"].tolist() == [r.departure_ns for r in REQUESTS[:-1]]


@pytest.mark.parametrize(
    ("data", "truncated"), [(b"", 0), (GOOD[:20], 1), (GOOD[: GOOD.index(b"\n") + 1], 0)]
)
def test_a_run_killed_at_its_start_is_a_table_without_rows(
    tmp_path: Path, data: bytes, truncated: int
) -> None:
    table = _read(tmp_path, data)
    assert (len(table), table.truncated) == (0, truncated)
    assert table["t"].dtype == np.int64


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\t11428945\t", b"\televen\t", r"line 2: column latency holds 'eleven'.*not an integer"),
        (b"\t7000001\t", b"\t7000001.5\t", r"line 3: column latency holds '7000001.5'"),
        (b"\t7000001\t", b"\t", r"line 3: 11 cells where there should be 12"),
        (b"\t2.25\t", b"\tfast\t", r"line 3: column slo_factor holds 'fast'.*not a number"),
        (b"request_id", b"requestid", r"line 1: this is not the header"),
        (b"\t2.25\t", b"\t\xff\t", r"line 3: column slo_factor"),
        (b"\t2.25\t", b"\t2.25 \t", r"line 3: column slo_factor holds '2.25 '"),
        (b"\t2.25\t", b"\t2\x00\t", r"line 3: column slo_factor"),
        (b"\t2.25\t", b"\t2_0.123456789\t", r"line 3: column slo_factor"),
        (b"\t7000001\t", b"\t+7000001\t", r"line 3: column latency holds '\+7000001'"),
        (b"\t7000001\t", b"\t\t", r"line 3: column latency holds '', which is not an integer"),
        (b"\t7000001\t", b"\t-\t", r"line 3: column latency holds '-'"),
        (b"\t7000001\t", b"\t9223372036854775808\t", r"line 3: column latency .*out of range"),
        (b"\t7000001\t", b"\t70000010000000000000\t", r"line 3: column latency .*out of range"),
        (b"\t7000001\t", b"\t\n", r"line 3: 7 cells where there should be 12"),
    ],
)
def test_a_malformed_row_names_file_and_line(
    tmp_path: Path, old: bytes, new: bytes, words: str
) -> None:
    with pytest.raises(MalformedLog, match=r"log\.tsv, " + words):
        _read(tmp_path, GOOD.replace(old, new))


_CELLS = {"number": int, "share": float, "flag": int}

_NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1) | st.integers(-1000, 1000)


@given(
    st.lists(st.tuples(_NUMBERS, st.floats(allow_nan=False), st.integers(0, 9)), max_size=40),
    st.integers(1, 200),
)
def test_any_numbers_in_blocks_of_any_size(rows: list[tuple[int, float, int]], size: int) -> None:
    text = "".join(f"{a}\t{b!r}\t{c}\n" for a, b, c in rows)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("slosched.telemetry.log_lines._BLOCK_BYTES", size)
        path = Path(folder) / "log.tsv"
        path.write_text(header_of(_CELLS) + "\n" + text + "12\t0.")
        table = read_table(path, _CELLS)
    assert table.truncated == 1
    read = [table[name].tolist() for name in _CELLS]
    assert list(zip(*read, strict=True)) == rows


@given(st.binary(max_size=12).filter(lambda cell: not {9, 10} & set(cell)))
def test_a_cell_is_a_number_or_an_error(cell: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.tsv"
        path.write_bytes(b"number\tshare\tflag\n1\t1\t1\n" + cell + b"\t0.5\t3\n")
        if re.fullmatch(rb"-?[0-9]+", cell):
            assert read_table(path, _CELLS)["number"].tolist() == [1, int(cell)]
        else:
            with pytest.raises(MalformedLog, match="line 3: column number holds"):
                read_table(path, _CELLS)


def test_a_line_in_a_later_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slosched.telemetry.log_lines._BLOCK_BYTES", 100)
    lines = ["number\tshare\tflag", *(f"{i}\t0.5\t1" for i in range(500)), ""]
    lines[301] = "300\thalf\t1"
    (tmp_path / "log.tsv").write_text("\n".join(lines))
    with pytest.raises(MalformedLog, match="line 302: column share holds 'half'"):
        read_table(tmp_path / "log.tsv", _CELLS)


def test_only_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_bytes(GOOD.replace(b"\t2.25\t", b"\tfast\t"))
    table = request_log.read_request_log(path, only=("t", "result"))
    assert list(table.columns) == ["t", "result"]
    assert table["t"].tolist() == [r.departure_ns for r in REQUESTS]
    with pytest.raises(MalformedLog, match="line 3"):
        request_log.read_request_log(path, only=("t", "slo_factor"))


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MalformedLog, match="No such file"):
        request_log.read_request_log(tmp_path / "absent.tsv")
