"""The azure workloads: reading traces, dealing functions to models, rates over time."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from arrival_statistics import assert_poisson_count, drain
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S
from slosched.workloads import parse_workload
from slosched.workloads.azure import ScaleStep, TraceReplay, trace_pieces
from slosched.workloads.azure_source import DIRECTORY_VARIABLE
from slosched.workloads.azure_trace import compact, ordered, read_trace
from slosched.workloads.zoo import zoo_models

SHORT = "invocations_per_function_md.anon.d01.csv"
LONG = "invocations_per_function_md.svls.anon.d01.csv"
MINUTE_NS = 60 * NS_PER_S


def trace_text(*rows: list[int]) -> str:
    header = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(
        str(minute) for minute in range(1, len(rows[0]) + 1)
    )
    lines = [f"o{i},a{i},f{i},http," + ",".join(map(str, row)) for i, row in enumerate(rows)]
    return "\n".join([header, *lines]) + "\n"


def azure(
    monkeypatch: pytest.MonkeyPatch, directory: Path, text: str, *rows: list[int]
) -> TraceReplay:
    (directory / SHORT).write_text(trace_text(*rows))
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(directory))
    name, *args = text.split()
    workload = parse_workload(name, args)
    assert isinstance(workload, TraceReplay)
    return workload


# --------------------------------------------------------------------------------------- reading


def test_rows_are_read_by_total_and_equal_ones_in_reverse(tmp_path: Path) -> None:
    path = tmp_path / SHORT
    path.write_text(trace_text([1, 0, 2], [300, 0, 0], [2, 1, 0], [0, 70000, 0]))
    trace = read_trace(path)
    assert [list(row) for row in trace.rows] == [[0, 70000, 0], [300, 0, 0], [2, 1, 0], [1, 0, 2]]
    assert [row.typecode for row in trace.rows] == ["I", "H", "B", "B"]
    assert trace.intervals == 3


def test_a_file_with_carriage_returns_and_blank_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / SHORT
    path.write_bytes(trace_text([1, 2], [3, 4]).replace("\n", "\r\n").encode() + b"\r\n")
    assert [list(row) for row in read_trace(path).rows] == [[3, 4], [1, 2]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: this is not the header of such a trace"),
        ("a,b,c,d\n", "line 1: this is not the header of such a trace"),
        ("a,b,c,d,e\n1,2,3,4,5\n", "line 1: this is not the header"),
        (trace_text([1, 2]).partition("\n")[0] + "\n", "has a header and no functions"),
        (trace_text([1, 2], [3, 4]) + "o,a,f,http,1\n", "line 4: 5 columns where the header has 6"),
        (trace_text([1, 2]) + "o,a,f,http,1,many\n", "line 3: minute 2 holds 'many', which is no"),
        (
            trace_text([1, 2]) + "o,a,f,http,-1,2\n",
            "line 3: minute 1 holds '-1', which is not a count",
        ),
        (trace_text([1, 2]) + "o,a,f,http,,2\n", "line 3: minute 1 holds '', which is not a count"),
        (trace_text([1, 2]) + "o,a,f,http,1,1e3\n", "line 3: minute 2 holds '1e3'"),
        (trace_text([1, 2]) + "o,a,f,http,1,99999999999\n", "line 3: minute 2 holds '99999999999'"),
    ],
)
def test_a_malformed_trace_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / SHORT
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        read_trace(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (["1", "3", "4"], "column 6 is '3' where minute 2 should be"),
        (["2", "3", "4"], "column 5 is '2' where minute 1 should be"),
        (["1", "2", "2"], "column 7 is '2' where minute 3 should be"),
        (["1", "2", "total"], "column 7 is 'total' where minute 3"),
        (["1", "", "3"], "column 6 is '' where minute 2"),
        ([str(minute) for minute in range(1, 1442)], "1441 minutes; a day has 1440"),
    ],
)
def test_a_minute_that_is_missing_is_an_error(
    tmp_path: Path, minutes: list[str], words: str
) -> None:
    """The calls of all later minutes would come too early, and fewer of them, in silence."""
    path = tmp_path / SHORT
    row = ",".join("1" for _ in minutes)
    path.write_text(
        f"HashOwner,HashApp,HashFunction,Trigger,{','.join(minutes)}\no,a,f,http,{row}\n"
    )
    with pytest.raises(InvalidConfig, match=f"line 1: {words}"):
        read_trace(path)


def test_a_column_about_the_function_that_is_missing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / SHORT
    path.write_text("HashOwner,HashApp,HashFunction,1,2,3\no,a,f,1,1,1\n")
    with pytest.raises(InvalidConfig, match="column 5 is '2' where minute 1 should be"):
        read_trace(path)


def test_quotes_and_semicolons_of_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / SHORT
    text = trace_text([1, 2], [3, 4])
    path.write_text(
        "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines())
    )
    assert [list(row) for row in read_trace(path).rows] == [[3, 4], [1, 2]]
    path.write_text(text.replace(",", ";"))
    with pytest.raises(InvalidConfig, match="separated by semicolons"):
        read_trace(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot read the trace"):
        read_trace(tmp_path)
    (tmp_path / SHORT).write_bytes(b"\xff\xfe\n")
    with pytest.raises(InvalidConfig, match="cannot read the trace"):
        read_trace(tmp_path / SHORT)


def test_the_directory_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    assert (
        "synthetic trace (seed 3"
        in parse_workload("azure", ["1", "1", "1", "4", "60", "3"]).describe()
    )
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(InvalidConfig, match=rf"neither {LONG} nor {SHORT}"):
        parse_workload("azure", [])
    (tmp_path / SHORT).touch()
    assert SHORT in parse_workload("azure", []).describe()
    (tmp_path / LONG).touch()  # the artifact's own comes first
    assert LONG in parse_workload("azure", []).describe()


# ----------------------------------------------------------------------------- models and scales


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("azure 1 1 1 1", 183),
        ("azure 1 1 1 2", 793),
        ("azure 1 1 1 3", 1769),
        ("azure 8", 4026),
        ("azure 1 0 1 1", 200),
        ("azure 1 0 1 2", 800),
        ("azure 1 0 1 3", 1800),
        ("azure 1 0", 3600),
        ("azure_half", 3100),
        ("azure_small", 183),
        ("azure_fast", 183),
        ("azure_single", 1),
        ("azure_scalability_exp 40 0.1 4 1.5 60 4", 4026),
    ],
)
def test_models_are_as_many_as_published(text: str, models: int) -> None:
    name, *args = text.split()
    uses = parse_workload(name, args).models()
    assert sum(use.copies for use in uses) == models
    if len(uses) > 1:
        assert [use.name for use in uses] == list(zoo_models())
        assert max(use.copies for use in uses) - min(use.copies for use in uses) <= 1


def test_scales_are_as_published() -> None:
    def scales(text: str) -> list[float]:
        name, *args = text.split()
        workload = parse_workload(name, args)
        assert isinstance(workload, TraceReplay)
        return [step.scale for step in workload.scales]

    assert scales("azure 8") == [1.0]
    assert scales("azure 6 1 2.0") == [1.5]
    assert scales("azure_half") == scales("azure_fast") == [1.0]
    # From 0.1 to 3.84 of 40 workers' load, in ten steps of a minute.
    growing = scales("azure_scalability_exp 40 0.1 4 1.5 60 4")
    assert growing == pytest.approx([0.5 * 1.5**i for i in range(10)])
    sweep = parse_workload("azure_scalability_exp", ["40", "0.1", "4", "1.5", "60", "4"])
    assert sweep.duration_ns == 600 * NS_PER_S
    assert [step.text for step in sweep.steps()][:3] == ["load 0.1", "load 0.15", "load 0.225"]
    assert parse_workload("azure", []).duration_ns == 8 * 3600 * NS_PER_S


def test_functions_are_dealt_to_models_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[2000 - i] for i in range(450)]
    workload = azure(monkeypatch, tmp_path, "azure 8 0 1 1 60", *rows)
    dealt = {stream.user_id: stream.instance() for stream in workload.streams(0)}
    assert dealt == {i: 200 * i // 450 for i in range(450)}
    assert max(Counter(dealt.values()).values()) == 3
    striped = azure(monkeypatch, tmp_path, "azure_small", *rows)
    assert {s.user_id: s.instance() for s in striped.streams(0)} == {i: i % 183 for i in range(450)}
    single = azure(monkeypatch, tmp_path, "azure_single", *rows)
    assert [(s.user_id, s.instance()) for s in single.streams(0)] == [(0, 0)]


# ----------------------------------------------------------------------------------------- rates


def test_counts_follow_the_trace_and_wrap_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ([6000, 0, 600], [0, 3000, 0], [0, 0, 0])
    workload = azure(monkeypatch, tmp_path, "azure 8 0 1 1 10s", *rows)
    streams = workload.streams(0)
    assert [stream.user_id for stream in streams] == [0, 1]  # no client calls the third
    arrivals = drain(workload, duration_ns=120 * NS_PER_S)
    counts = Counter((a.user_id, a.at_ns // (10 * NS_PER_S) % 3) for a in arrivals)
    # A count is a rate per minute, whatever an interval lasts; 120 s are four passes of 30 s.
    assert_poisson_count(counts[0, 0], 6000 / 60 * 40)
    assert_poisson_count(counts[0, 2], 600 / 60 * 40)
    assert_poisson_count(counts[1, 1], 3000 / 60 * 40)
    assert sum(counts.values()) == counts[0, 0] + counts[0, 2] + counts[1, 1]


def test_the_load_factor_and_the_workers_scale_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = azure(monkeypatch, tmp_path, "azure 4 0 0.5 1", [60_000] * 3)
    arrivals = drain(workload, duration_ns=40 * NS_PER_S)
    assert_poisson_count(len(arrivals), 60_000 / 60 * 0.125 * 4 * 0.5 * 40)


def test_a_growing_load_is_exact_in_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ([6000] * 3, [600] * 3, [60] * 3)
    workload = azure(monkeypatch, tmp_path, "azure_scalability_exp 8 0.25 4 2 25 1", *rows)
    arrivals = drain(workload)
    for step, count in sorted(Counter(a.step for a in arrivals).items()):
        assert_poisson_count(count, 111 * 25 * 0.25 * 2**step)
    assert all(a.step == a.at_ns // (25 * NS_PER_S) for a in arrivals)


def test_functions_may_start_anywhere_in_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Called in the first tenth only; from random starts that tenth comes at any time.
    rows = [[6000] + [0] * 9] * 200
    together = azure(monkeypatch, tmp_path, "azure 8 0 1 1 1s", *rows)
    assert max(a.at_ns for a in drain(together, duration_ns=9 * NS_PER_S)) < NS_PER_S
    spread = azure(monkeypatch, tmp_path, "azure 8 0 1 1 1s 1 1", *rows)
    arrivals = drain(spread, duration_ns=10 * NS_PER_S)
    seconds = Counter(a.at_ns // NS_PER_S for a in arrivals)
    assert len(seconds) == 10 and max(seconds.values()) < 3 * min(seconds.values())
    assert_poisson_count(len(arrivals), 200 * 100)
    assert all(count > 50 for count in Counter(a.user_id for a in arrivals).values())


def test_pieces_skip_what_is_never_called() -> None:
    counts = compact([0, 3, 0, 0, 5])
    scales = (ScaleStep(0, 70, 60.0), ScaleStep(70, 100, 120.0))
    pieces = list(trace_pieces(counts, interval_ns=10, scales=scales, offset_ns=15))
    # 15 ns into the trace: the rest of the second interval is due at once.
    assert pieces == [
        (0, 5, 3.0),
        (25, 35, 5.0),
        (45, 55, 3.0),
        (75, 85, 10.0),
        (95, 100, 6.0),
    ]
    none = trace_pieces(compact([0, 0]), interval_ns=10, scales=scales)
    assert list(none) == []


def test_thousands_of_rare_functions_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [compact([0] * 1440) for _ in range(3000)] + [compact([0] * 1439 + [1])] * 1000
    trace = ordered([*rows, compact([600] * 1440)])
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr("slosched.workloads.azure_source._load", lambda source, stamp: trace)
    workload = parse_workload("azure", ["8", "0", "1", "1", "60"])
    assert len(workload.streams(0)) == 1001
    arrivals = drain(workload, duration_ns=60 * NS_PER_S)
    assert {a.user_id for a in arrivals} == {0}
    assert_poisson_count(len(arrivals), 600)


def test_streams_depend_on_their_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = azure(monkeypatch, tmp_path, "azure 8 0 1 1 60", [600] * 2, [600] * 2)
    first = [(a.at_ns, a.user_id) for a in islice(drain(workload, duration_ns=MINUTE_NS), 200)]
    again = [(a.at_ns, a.user_id) for a in islice(drain(workload, duration_ns=MINUTE_NS), 200)]
    other = [
        (a.at_ns, a.user_id) for a in islice(drain(workload, seed=1, duration_ns=MINUTE_NS), 200)
    ]
    assert first == again != other
    assert {at for at, user in first if user == 0}.isdisjoint(at for at, user in first if user == 1)
