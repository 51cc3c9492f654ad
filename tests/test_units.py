"""Durations and sizes as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from slosched.cli.controller import _parse_positionals
from slosched.cli.values import duration_ns, weight_rules
from slosched.command_line import weights_text
from slosched.config_file import load_controller_config
from slosched.errors import InvalidConfig, InvalidDuration
from slosched.units import (
    exact_bytes,
    exact_duration,
    format_share,
    parse_bytes,
    parse_duration_ns,
)


@pytest.mark.parametrize("unit", ["us", "\u00b5s", "\u03bcs"])
def test_a_microsecond_may_have_either_mu(unit: str) -> None:
    assert parse_duration_ns(f"250{unit}", bare_unit="s") == 250_000


@pytest.mark.parametrize("exponent", ["999999999", "9999999999999999999", "400", "19"])
def test_a_number_past_every_clock_is_an_error(exponent: str) -> None:
    with pytest.raises(InvalidDuration, match=r"too long|exponent"):
        parse_duration_ns(f"1e{exponent}s", bare_unit="s")


@pytest.mark.parametrize("text", ["25ns", "999ns", "0.5us", "1e-30s", "0.0000001", "1e-999999999s"])
def test_a_duration_below_a_microsecond_is_refused(text: str) -> None:
    with pytest.raises(InvalidDuration, match="less than 1us; write the unit that you mean"):
        parse_duration_ns(text, bare_unit="s")


def test_the_error_names_the_unit_of_a_bare_number() -> None:
    with pytest.raises(
        InvalidDuration, match=r"25 nanoseconds .*is in nanoseconds here.*25ms or 25s"
    ):
        parse_duration_ns("25", bare_unit="ns")
    with pytest.raises(
        InvalidDuration, match=r"would be 5000000 seconds .*is in seconds here.*5000000ns"
    ):
        duration_ns("--schedule-ahead", "5000000")
    for option in ("--latency", "--jitter", "--max-exec", "--grid"):
        with pytest.raises(InvalidDuration, match="200000ns"):  # 200us, as it was once written
            duration_ns(option, "200000", may_be_0=True)
    assert duration_ns("--latency", "200000s") == duration_ns("--duration", "200000") == 2 * 10**14
    assert duration_ns("--duration", "5000000s") == 5_000_000 * 10**9
    assert parse_duration_ns("0", bare_unit="ns") == 0


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0ns"), (7, "7ns"), (250_000, "250us"), (90 * 10**9, "90s"), (7200 * 10**9, "2h")],
)
def test_an_exact_duration_reads_back(number: int, text: str) -> None:
    assert exact_duration(number) == text
    assert number < 1000 or parse_duration_ns(text, bare_unit="ns") == number


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1000, "1000"), (2**24, "16MiB"), (3 * 2**30, "3GiB")]
)
def test_an_exact_size_reads_back(number: int, text: str) -> None:
    assert exact_bytes(number) == text and parse_bytes(text) == number


def test_bare_numbers_of_options_are_seconds_and_positional_ones_clockworks() -> None:
    assert duration_ns("--default-slo", "0.1") == 100_000_000
    assert _parse_positionals(["0", "6", "5000000", "100000000"], ()) == {
        "generate_inputs": False,
        "max_gpus": 6,
        "schedule_ahead_ns": 5_000_000,
        "default_slo_ns": 100_000_000,
    }
    [rule] = weight_rules("--weights", "slo<=0.01=2")
    assert rule.slo_max_ns == 10_000_000
    assert weight_rules("--weights", weights_text([rule])) == (rule,)


def test_a_configuration_file_says_its_unit(tmp_path: Path) -> None:
    path = tmp_path / "controller.toml"

    def read(text: str) -> int | None:
        path.write_text(f'workers = ["a:1"]\n[scheduler]\n{text}\n')
        return load_controller_config(path).scheduler.schedule_ahead_ns

    assert read('schedule_ahead = "5ms"') == read("schedule_ahead_ns = 5000000") == 5_000_000
    assert read('schedule_ahead_ns = "5ms"') == 5_000_000
    for text in ("schedule_ahead = 5", 'schedule_ahead = "5"', 'schedule_ahead_ns = "5000000"'):
        with pytest.raises(InvalidConfig, match="unit"):
            read(text)


@pytest.mark.parametrize("text", ["9" * 5000, "1e5", "-1", "1XB", f"{'9' * 41}TiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InvalidConfig, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("good", "count", "text"),
    [
        (999_999, 1_000_000, "99.99 %"),
        (1, 1, "100.00 %"),
        (57, 100, "57.00 %"),
        (29, 100, "29.00 %"),
        (9_899, 10_000, "98.99 %"),
        (2, 3, "66.66 %"),
        (0, 5, "0.00 %"),
    ],
)
def test_a_share_is_rounded_down(good: int, count: int, text: str) -> None:
    assert format_share(good / count) == text
    assert all(format_share(k / 100, 0) == f"{k} %" for k in range(101))
    assert format_share(float("nan")) == "-"
