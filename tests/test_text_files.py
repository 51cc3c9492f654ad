"""Texts from other systems: one reader, one rule, for every file that people hand in."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import slosched
from slosched.config_file import dump_profile, load_controller_config, load_profile
from slosched.errors import InvalidConfig
from slosched.sim.fault_file import load_plan
from slosched.telemetry.table import MalformedLog, header_of, read_table
from slosched.text_files import open_lines, read_text
from slosched.workloads.azure_trace import read_trace
from slosched.workloads.mix_file import load_mix
from slosched.workloads.replay import read_requests
from slosched.workloads.spec_file import load_workload

_WRITTEN: dict[str, Callable[[str], bytes]] = {
    "unix": lambda text: text.encode(),
    "windows": lambda text: text.replace("\n", "\r\n").encode(),
    "bom": lambda text: codecs.BOM_UTF8 + text.encode(),
    "notepad": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "powershell": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
}

_WORKLOADS = Path(__file__).parent.parent / "workloads"
_REQUESTS = "".join(
    "\t".join(row.split()) + "\n"
    for row in (
        "t latency user_id model_id slo_factor deadline",
        "5000 1000 1 0 2.5 0",
        "9000 1000 1 3 0 70",
    )
)
_READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "controller": (
        load_controller_config,
        'workers = ["a:1"]\n[scheduler]\nschedule_ahead = "5ms"\n',
    ),
    "profile": (load_profile, dump_profile(load_profile("v100"))),
    "workload": (load_workload, (_WORKLOADS / "gamma.toml").read_text()),
    "mix": (load_mix, (_WORKLOADS / "plan-example.toml").read_text()),
    "faults": (
        load_plan,
        '[[fault]]\nkind = "crash"\ntarget = "worker 0"\nat = "2s"\nfor = "1s"\n',
    ),
    "azure": (read_trace, "HashOwner,HashApp,HashFunction,Trigger,1,2\no,a,f,http,3,4\n"),
    "replay": (lambda path: list(read_requests(path).offsets_ns), _REQUESTS),
    "text": (lambda path: read_text(path, "the file"), "a\nb \u00b5\n"),
}


@pytest.mark.parametrize("system", _WRITTEN)
@pytest.mark.parametrize("reader", _READERS)
def test_files_of_every_system_read_the_same(reader: str, system: str, tmp_path: Path) -> None:
    read, text = _READERS[reader]
    path = tmp_path / "file.toml"
    path.write_bytes(text.encode())
    expected = read(path)
    path.write_bytes(_WRITTEN[system](text))
    assert read(path) == expected


@pytest.mark.parametrize("reader", _READERS)
@pytest.mark.parametrize("data", [b"a = '\xff'\n", b"\xff\xfea", b"\xef\xbb\xbf\xff"])
def test_what_is_no_text_is_an_error(reader: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(data)
    with pytest.raises(InvalidConfig, match=r"file\.toml"):
        _READERS[reader][0](path)
    with pytest.raises(InvalidConfig, match=r"cannot read .*Is a directory"):
        _READERS[reader][0](tmp_path / ".." / tmp_path.name)


_CELLS = {"t": int, "x": float}


@pytest.mark.parametrize("system", ["unix", "windows", "bom", "notepad"])
def test_a_log_that_came_over_windows(system: str, tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    rows = "".join(f"{n}\t{n / 2}\n" for n in range(1000))
    path.write_bytes(_WRITTEN[system](header_of(_CELLS) + "\n" + rows + "12\t0."))
    table = read_table(path, _CELLS)
    assert table["t"].tolist() == list(range(1000)) and table.truncated == 1
    assert np.array_equal(table["x"], np.arange(1000) / 2)


def test_a_log_in_utf_16_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_bytes(_WRITTEN["powershell"](header_of(_CELLS) + "\n1\t2\n"))
    with pytest.raises(MalformedLog, match="line 1"):
        read_table(path, _CELLS)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("1,00E+18", "decimal comma"),
        ("1,5", "decimal comma"),
        ("1.000,5", "decimal comma"),
        ("1.00E+18", "spreadsheet rounded"),
        ("5000.0", "spreadsheet rounded"),
        ("5e3", "spreadsheet rounded"),
    ],
)
def test_numbers_of_a_spreadsheet_are_named_alike(cell: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text(_REQUESTS.replace("5000\t", f"{cell}\t"))
    with pytest.raises(InvalidConfig, match=rf"line 2: column t: .*{words}"):
        read_requests(path)
    path.write_text(f"{header_of(_CELLS)}\n{cell}\t1\n")
    with pytest.raises(MalformedLog, match=rf"line 2: column t holds .*{words}"):
        read_table(path, _CELLS)
    path.write_text(f'HashOwner,HashApp,HashFunction,Trigger,1\no,a,f,http,"{cell}"\n')
    with pytest.raises(InvalidConfig, match=rf"line 2: minute 1 holds .*{words}"):
        read_trace(path)


def test_a_decimal_comma_in_a_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text(_REQUESTS.replace("2.5", "2,5"))
    with pytest.raises(
        InvalidConfig, match="column slo_factor: '2,5' is a number with a decimal comma"
    ):
        read_requests(path)
    path.write_text(f"{header_of(_CELLS)}\n1\t2,5\n")
    with pytest.raises(
        MalformedLog, match="column x holds '2,5', which is a number with a decimal"
    ):
        read_table(path, _CELLS)


def test_nothing_else_reads_texts_that_people_hand_in() -> None:
    """`tomllib` and `open(encoding=...)` elsewhere would be a second rule."""
    package = Path(slosched.__file__).parent
    for path in package.rglob("*.py"):
        own_profiles = ("profiles.py", "zoo.py")
        if path.name in ("text_files.py", *own_profiles):
            continue
        assert "tomllib.loads" not in path.read_text(), path


def test_a_text_without_an_end_is_not_read_for_ever(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * (1 << 20))
    assert len(read_text(tmp_path / "text", "", longest=1 << 20)) == 1 << 20
    with (tmp_path / "text").open("a") as file:
        file.write("y")
    with pytest.raises(InvalidConfig, match=r"the log .*text: it is longer than 1 MiB"):
        read_text(tmp_path / "text", "the log", longest=1 << 20)
    for device in ("/dev/zero", "/dev/urandom"):
        with pytest.raises(InvalidConfig, match=f"the log {device}: it is a device; name a file"):
            read_text(Path(device), "the log")
        with (
            pytest.raises(InvalidConfig, match="it is a device"),
            open_lines(Path(device), "the log") as lines,
        ):
            next(lines)
    assert read_text(Path("/dev/null"), "") == ""
