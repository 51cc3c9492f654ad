"""The option table: a field of a config is an option, and everything else follows from that row."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from msgspec import Meta
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.cli.config_options import Options, takes_options, values_of
from slosched.command_line import command_line
from slosched.config import (
    ControllerConfig,
    EmulationNoise,
    ModelSource,
    SchedulerConfig,
    WeightRule,
    WorkerConfig,
)
from slosched.config_file.tables import KINDS_IN_WORDS, kind_of, read_values
from slosched.errors import InvalidConfig, UnknownName
from slosched.field_types import AtLeast1, check_types
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.options import Option, bounds_text, plain, row, rows, status_options

CONFIGS = (ControllerConfig, SchedulerConfig, WorkerConfig)
TABLES = (*CONFIGS, EmulationNoise, ModelSource, WeightRule, GpuProfile, ModelProfile)


@dataclass(frozen=True)
class _Oven:
    """A config of which nothing else in the package knows."""

    heat_ns: Annotated[AtLeast1, Option(help="How long it heats.")] = 5_000_000
    size_bytes: Annotated[
        AtLeast1 | None, Option(help="How large it is. Default: small.", name="large")
    ] = None
    light: Annotated[bool, Option(help="Light in it.")] = False
    fan: Annotated[bool, Option(help="The fan.", flag="--fan/--still", in_status=False)] = True
    mode: Annotated[str, Option(help="What it does.", one_of=("bake", "grill"))] = "bake"
    racks: Annotated[tuple[str, ...], Option(help="Names of racks.")] = ()
    share: Annotated[Annotated[float, Meta(ge=0, lt=0.5)], Option(help="Of {default}.")] = 0.25
    inside: int = 3
    hidden: Annotated[int, Option(in_file=False)] = 0

    def __post_init__(self) -> None:
        check_types(self)


def run(*words: str) -> Any:
    taken: list[Options] = []
    oven = typer.Typer()

    @oven.command()
    @takes_options(_Oven)
    def command(*, options: Options) -> None:
        taken.append(options)

    result = CliRunner().invoke(oven, words)
    assert result.exit_code == 0, result.output
    return _Oven(**values_of(_Oven, taken[0])) if taken else result.output


WORDS = (
    "--heat",
    "2ms",
    "--large",
    "1KiB",
    "--light",
    "--still",
    "--mode",
    "grill",
    "--racks",
    "a,b",
)
MADE = _Oven(
    heat_ns=2_000_000,
    size_bytes=1024,
    light=True,
    fan=False,
    mode="grill",
    racks=("a", "b"),
    share=0.125,
)


def test_a_row_is_an_option_of_a_command_and_reads_back() -> None:
    assert run() == _Oven()
    assert run(*WORDS, "--share", "0.125") == MADE
    for oven in (MADE, _Oven()):
        assert run(*command_line(oven)) == oven
    assert "--inside" not in command_line(MADE) and "--hidden" not in command_line(MADE)


def test_a_row_is_a_key_of_a_file() -> None:
    table = {"heat": "2ms", "large": "1KiB", "light": True, "fan": False, "mode": "grill"}
    assert _Oven(**read_values("it", table | {"racks": ["a", "b"], "share": 0.125}, _Oven)) == MADE
    assert read_values("it", {"size_bytes": 7, "heat_ns": 9, "inside": 4}, _Oven) == {
        "size_bytes": 7,
        "heat_ns": 9,
        "inside": 4,
    }
    with pytest.raises(InvalidConfig, match="it: heat must be at least 1, not '0ms'"):
        read_values("it", {"heat": "0ms"}, _Oven)
    with pytest.raises(InvalidConfig, match=r"it: share must be at least 0 and below 0\.5, not 1"):
        read_values("it", {"share": 1}, _Oven)
    with pytest.raises(InvalidConfig, match=r"unknown key 'lights' \(did you mean light\?\)"):
        read_values("it", {"lights": True}, _Oven)
    with pytest.raises(
        InvalidConfig, match="unknown key 'hidden'; known: fan, heat, inside, large"
    ):
        read_values("it", {"hidden": 1}, _Oven)


def test_a_row_says_its_default_once() -> None:
    said = {each.name: each.help for each in rows(_Oven) if each.on_command_line}
    assert said["heat"] == "How long it heats. Default 5ms."
    assert said["large"] == "How large it is. Default: small."
    assert said["light"] == "Light in it. Default no."
    assert said["fan"] == "The fan. Default --fan."
    assert said["racks"] == "Names of racks."
    assert said["share"] == "Of 0.25."


def test_a_value_out_of_bounds_is_named_where_a_program_makes_the_config() -> None:
    with pytest.raises(InvalidConfig, match="heat_ns must be at least 1, not 0"):
        _Oven(heat_ns=0)
    with pytest.raises(InvalidConfig, match=r"share must be at least 0 and below 0\.5, not 0\.5"):
        _Oven(share=0.5)
    with pytest.raises(UnknownName, match=r"unknown mode 'gril' \(did you mean grill"):
        _Oven(mode="gril")
    assert bounds_text(Meta(ge=0, le=65535)) == "within 0..65535"
    assert bounds_text(Meta(ge=1, le=2_000_000)) == "within 1..2000000"


def test_status_shows_the_rows_that_say_so() -> None:
    assert list(status_options(MADE)) == [
        "heat_ns",
        "size_bytes",
        "light",
        "mode",
        "racks",
        "share",
    ]
    shown = status_options(SchedulerConfig(max_batch=4))
    assert (shown["max_batch"], shown["placement"], shown["max_exec_ns"]) == (4, "gain", None)
    assert not {"policy", "fidelity", "weights", "client_weights", "max_bytes"} & shown.keys()


@pytest.mark.parametrize("config", TABLES)
def test_every_row_can_be_said_in_a_file_and_is_spelt_in_one_way(config: type) -> None:
    names = [each.name for each in rows(config)]
    assert len(set(names)) == len(names) == len(fields(config))
    for each in rows(config):
        if each.option.in_file:
            assert plain(kind_of(each)) in KINDS_IN_WORDS, each.field


def test_sizes_and_durations_are_written_as_people_write_them() -> None:
    assert row(SchedulerConfig, "max_slo_ns").help.endswith(" Default 48h.")
    assert row(SchedulerConfig, "max_bytes").help.endswith(" Default 8GiB.")
    assert not [each.help for config in CONFIGS for each in rows(config) if "{" in each.help]


@pytest.mark.parametrize("command", ["worker", "controller"])
def test_a_command_has_its_rows(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"]).output
    configs = (WorkerConfig,) if command == "worker" else (ControllerConfig, SchedulerConfig)
    for config in configs:
        for each in rows(config):
            flag = each.argument.partition("/")[0]
            assert (f" {flag} " in shown) == (each.on_command_line or flag == "--workers"), flag
