"""The workload `mix`: each model's rate, burstiness and SLO, from the command line and from TOML."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from slosched.errors import InvalidConfig
from slosched.workloads import parse_workload
from slosched.workloads.composed import Composed
from slosched.workloads.engine import open_loop_arrivals
from slosched.workloads.mix import MixEntry, mix
from slosched.workloads.mix_file import load_mix
from slosched.workloads.spec_file import load_workload

MS = 1_000_000
S = 1_000_000_000


def test_a_mix_sends_each_model_at_its_rate_with_its_slo() -> None:
    entries = (
        MixEntry("resnet50_v2", 4, 400.0, (0.0, 25 * MS)),
        MixEntry("resnet50_v2", 2, 100.0, (5.0, 0), cv=3.0),
    )
    workload = mix(entries, 100 * S)
    assert workload.groups == ("resnet50_v2 #1", "resnet50_v2 #2")
    assert workload.models() == (("resnet50_v2", 4), ("resnet50_v2", 2))
    arrivals = list(open_loop_arrivals(workload, seed=5))
    first = [a for a in arrivals if a.instance < 4]
    second = [a for a in arrivals if a.instance >= 4]
    # Six standard deviations of a Poisson count; of the bursty one, three times as many.
    assert abs(len(first) - 40_000) < 6 * 200
    assert abs(len(second) - 10_000) < 6 * 300
    assert {(a.slo_factor, a.slo_ns) for a in first} == {(0.0, 25 * MS)}
    assert {(a.slo_factor, a.slo_ns) for a in second} == {(5.0, 0)}
    for instance in range(6):
        times = [a.at_ns for a in arrivals if a.instance == instance]
        gaps = [b - a for a, b in pairwise(times)]
        mean = sum(gaps) / len(gaps)
        deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
        assert deviation / mean == pytest.approx(1.0 if instance < 4 else 3.0, rel=0.15)


def test_the_file_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        'workload = "mix"\nrate = 1000\nslo = "30ms"\nduration = "4s"\n'
        '[[models]]\nname = "a"\nshare = 3\ncopies = 2\n'
        '[[models]]\nname = "b"\nshare = 1\nslo = 5\ncv = 2\n'
    )
    loaded = load_workload(path)
    assert loaded == load_mix(path).workload()
    assert loaded == parse_workload("mix", ["a:2:750:30ms,b:1:250:5:2", "4s"])
    scaled = load_mix(path, rate_per_s=400, slo=(0.0, MS)).entries
    assert [(entry.rate_per_s, entry.slo) for entry in scaled] == [
        (300, (0.0, MS)),
        (100, (0.0, MS)),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate = 10\n", "m.toml: there must be a [[models]] table for each model"),
        ('workload = "gamma"\n', "m.toml, line 1: the workload must be 'mix', not 'gamma'"),
        ("speed = 1\n", "m.toml, line 1: unknown key 'speed'; known: workload, duration"),
        ('[[models]]\nname = "a"\nshare = 1\n', "the models have shares, but of what rate?"),
        (
            '[[models]]\nname = "a"\nrate = 1\n\n[[models]]\nname = "b"\nshare = 1\n',
            "m.toml, line 7: model 2: the models before have a rate: all need the same",
        ),
        ('[[models]]\nname = "a"\n', "m.toml, line 1: model 1: give share or rate, one of them"),
        ("[[models]]\nrate = 1\n", "m.toml, line 1: model 1: the model's name is missing"),
        (
            '[[models]]\nname = "a"\nrate = "fast"\n',
            "m.toml, line 3: model 1: rate must be a number, not 'fast'",
        ),
        (
            'rate = 3\n[[models]]\nname = "a"\nrate = 1\n',
            "m.toml, line 1: the models have rates of their own; leave this out",
        ),
        (
            '[[models]]\nname = "a"\nrate = 1\ncopies = 0\n',
            "m.toml, line 4: model 1: copies must be within 1..100000, not 0",
        ),
        (
            '[[models]]\nname = "a"\nrate = 1\narrivals = "gamma"\n',
            "m.toml, line 4: model 1: gamma arrivals need a cv",
        ),
        (
            '[[models]]\nname = "a"\nrate = 1\ncv = 1000\n',
            "m.toml, line 4: model 1: cv must be within 0.01..100, not 1000",
        ),
        (
            '[[models]]\nname = "a"\nrate = 1\nslo = [1]\n',
            "m.toml, line 4: model 1: slo must be a number or a text, not [1]",
        ),
        ("rate = \n", "m.toml is not a TOML file"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        load_mix(path)
    assert words in str(caught.value)


def test_a_wrong_model_on_the_command_line_shows_the_form() -> None:
    with pytest.raises(
        InvalidConfig, match=r"'resnet50:3' is not a model; write it as NAME:COPIES"
    ):
        parse_workload("mix", ["resnet50:3"])


def composed(args: list[str]) -> Composed:
    made = parse_workload("mix", args)
    assert isinstance(made, Composed)
    return made


@pytest.mark.parametrize("more", ["", ":25ms", ":5:2", ":5::32~0.5~8~64"])
def test_a_version_is_named_with_an_at_sign_where_colons_part(more: str) -> None:
    made = composed([f"digits@12:2:30{more},digits:1:5", "2s"])
    assert [use.name for use in made.uses] == ["digits:12", "digits"]
    assert made.args[0].startswith("digits@12:2:30")
    assert parse_workload("mix", list(made.args)) == made


def test_a_version_in_a_file_is_written_as_the_command_line_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('duration = "1s"\n[[models]]\nname = "digits:3"\nrate = 4\n')
    made = load_mix(path).workload()
    assert [use.name for use in made.uses] == ["digits:3"]
    assert parse_workload("mix", list(made.args)) == made


@pytest.mark.parametrize("name", ["digits@", "digits@01", "@1", "digits@latest", "a@b", "digits@0"])
def test_what_is_no_version_behind_an_at_sign_stays_in_the_name(name: str) -> None:
    made = composed([f"{name}:1:5", "2s"])
    assert [use.name for use in made.uses] == [name]


def test_a_version_with_a_colon_is_answered_with_the_form() -> None:
    words = (
        r"'digits:1:1:20:25ms': cv must be a number, not '25ms'; write a version as NAME@VERSION"
    )
    with pytest.raises(InvalidConfig, match=words):
        parse_workload("mix", ["digits:1:1:20:25ms"])
