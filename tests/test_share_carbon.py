"""Carbon and cost: the published constants computed again, and everything that a file may replace."""

from __future__ import annotations

from pathlib import Path

import pytest

from slosched.errors import InvalidConfig, UnknownName
from slosched.share.carbon import device_of, embodied_g, footprint, read_constants

CONSTANTS = read_constants()


@pytest.mark.parametrize(
    ("device", "grams", "ug_per_s", "usd"),
    [("4090", 19040, 156.5, 0.5), ("a100", 21562, 177.2, 1.79), ("a6000", 18174, 149.4, 0.8)],
)
def test_hotcarbons_constants(device: str, grams: int, ug_per_s: float, usd: float) -> None:
    assert round(embodied_g(device, CONSTANTS)) == grams
    assert CONSTANTS.devices[device].usd_per_h == usd
    # Its lifetime is four years of 352 days; ours are true years.
    as_coded = 4 * 352 * 86_400
    assert as_coded == 121_651_200
    assert round(1e6 * embodied_g(device, CONSTANTS) / as_coded, 1) == ug_per_s
    assert CONSTANTS.life_s == 4 * 365.25 * 86_400


def test_an_h200_by_the_same_formula() -> None:
    expected = (583 * 2.75 + 430 + 500) * 8.14 / 0.9 + 66.6 * 141 + 300
    assert embodied_g("h200", CONSTANTS) == pytest.approx(expected)
    assert round(expected / 1000, 1) == 32.6
    with pytest.raises(UnknownName, match="unknown device 'v100'"):
        embodied_g("v100", CONSTANTS)


def test_a_run_of_300_s_as_hotcarbon_counts_it() -> None:
    found = footprint(90_000.0, 300.0, names=("NVIDIA GeForce RTX 4090",), constants=CONSTANTS)
    assert found.device == "4090" and found.kwh == pytest.approx(0.025)
    assert found.operational_g == pytest.approx(10.0)
    assert found.embodied_g == pytest.approx(19_040 * 300 / (4 * 365.25 * 86_400), rel=1e-4)
    assert found.usd == pytest.approx(0.5 / 12)
    assert found.total_g == pytest.approx(10.0 + (found.embodied_g or 0))
    assert found.constants["grid_g_per_kwh"] == 400.0 and found.constants["pue"] == 1.0


def test_what_is_unknown_is_said() -> None:
    found = footprint(None, 10.0, names=("", "emulated"), constants=CONSTANTS)
    assert found.operational_g is found.embodied_g is found.total_g is found.usd is None
    assert found.problem.startswith("energy is unknown; no device of the table (4090, a100,")
    assert found.problem.endswith("is named 'emulated'")
    twice = footprint(None, 10.0, names=("", "cpu", "cpu"), constants=CONSTANTS)
    assert twice.problem.endswith("is named 'cpu'")


@pytest.mark.parametrize(
    ("names", "device"),
    [
        (("NVIDIA H200",), "h200"),
        (("NVIDIA A100 80GB PCIe",), "a100"),
        (("NVIDIA RTX A6000",), "a6000"),
        (("", "4090-tm"), "4090"),
        (("cpu", "gpu"), ""),
    ],
)
def test_a_device_is_found_by_its_name(names: tuple[str, ...], device: str) -> None:
    assert device_of(names, CONSTANTS) == device


def test_a_file_replaces_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[grid]\ng_per_kwh = 100.0\npue = 1.5\n[devices.h200]\nusd_per_h = 9.0\n"
        "[devices.mine]\nkwh_per_cm2 = 1.0\ngas_g_per_cm2 = 0.0\ndie_cm2 = 9.0\nmemory_gb = 0.0\n"
        "usd_per_h = 1.0\n"
    )
    constants = read_constants(file)
    assert constants.devices["h200"].usd_per_h == 9.0
    assert constants.devices["h200"].memory_gb == 141.0
    assert embodied_g("mine", constants) == pytest.approx((583 + 500) * 10 + 300)
    found = footprint(3.6e6, 3600.0, names=("mine",), constants=constants)
    assert found.operational_g == pytest.approx(150.0) and found.usd == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[grid]\npue = 0.5", "grid.pue must be at least 1, not 0.5"),
        ("[grid]\ng_per_kwh = -1.0", "grid.g_per_kwh must be at least 0"),
        ("[life]\nyears = 0.0", "life.years"),
        ("[act]\nyield = 1.1", "act.yield must be at most 1"),
        ("[act]\nyield = nan", "act.yield must be at least 0.01, not nan"),
        ("[grid]\ncarbon = 3", "carbon"),
        (
            "pue = 1.2",
            "`pue` (its tables are grid, life, act and devices, as in our own carbon.toml)",
        ),
        ("grid = 3", "grid"),
        ("[devices.new]\ndie_cm2 = 1.0", "missing required field"),
        ("[devices.h200]\ndie_cm2 = -1.0", "die_cm2 of h200 must be at least 0"),
        ("[grid\n", "is not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(InvalidConfig) as raised:
        read_constants(file)
    assert says in str(raised.value) and "wrong.toml" in str(raised.value)


def hourly(tmp_path: Path, text: str) -> Path:
    (tmp_path / "grid.csv").write_text(text)
    file = tmp_path / "mine.toml"
    file.write_text('[grid]\nhourly = "grid.csv"\n')
    return file


def test_hours_of_a_day(tmp_path: Path) -> None:
    lines = "".join(f"{hour},{100 * (hour + 1)}\n" for hour in range(24))
    constants = read_constants(hourly(tmp_path, "hour,g_per_kwh\n" + lines))
    # From 23:30 for an hour: half at 2400 g, half at 100 g.
    found = footprint(
        3.6e6, 3600.0, names=("h200",), constants=constants, begin_epoch_s=86_400 - 1800
    )
    assert found.operational_g == pytest.approx(1250.0)
    assert found.constants["grid"] == "hourly: grid.csv"
    unknown = footprint(3.6e6, 3600.0, names=("h200",), constants=constants)
    assert unknown.operational_g == pytest.approx(400.0)
    assert "is unknown" in str(unknown.constants["grid"])


def test_hours_with_dates(tmp_path: Path) -> None:
    text = "timestamp,zone,g_per_kwh\n2024-05-08T00:00,DE,300\n2024-05-08T03:00:00+02:00,DE,500\n"
    constants = read_constants(hourly(tmp_path, text))
    begin = 1_715_126_400  # 2024-05-08 00:00 UTC
    found = footprint(3.6e6, 7200.0, names=("h200",), constants=constants, begin_epoch_s=begin)
    assert found.operational_g == pytest.approx(400.0)
    later = footprint(3.6e6, 1.0, names=("h200",), constants=constants, begin_epoch_s=begin + 9000)
    assert "lacks the run's hours" in str(later.constants["grid"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "they are missing"),
        ("when,g_per_kwh\n", "they are when, g_per_kwh"),
        ("hour,g_per_kwh\n1,2\n", "1 hours; a day of hours has 24"),
        ("hour,g_per_kwh\n25,2\n", "line 2: hour 25 is not within 0..23"),
        ("hour,g_per_kwh\n1,x\n", "line 2"),
        ("hour,g_per_kwh\n1\n", "line 2"),
        ("hour,g_per_kwh\n1,nan\n", "line 2: g_per_kwh is nan"),
        ("timestamp,g_per_kwh\nyesterday,2\n", "line 2"),
        ('hour,g_per_kwh\n1,"' + 140_000 * "x", "not a CSV file"),
    ],
)
def test_a_wrong_hourly_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidConfig, match=r"grid\.csv") as raised:
        read_constants(hourly(tmp_path, text))
    assert says in str(raised.value)
