"""The registry, and workloads from TOML files: every one parses, says what it is and can be sent on."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from slosched.cli.workload import announce_trace
from slosched.config_file import load_profile
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_S
from slosched.workloads import WORKLOADS, parse_workload, workload_from_table
from slosched.workloads.azure_source import DIRECTORY_VARIABLE
from slosched.workloads.azure_synthetic import write_trace
from slosched.workloads.cascade_trace import cascade_of
from slosched.workloads.engine import Engine
from slosched.workloads.registry import KINDS, Kind
from slosched.workloads.spec_file import load_workload

ROOT = Path(__file__).parent.parent
SPECS = sorted((ROOT / "workloads").glob("*.toml"))
PUBLISHED = (
    "example",
    "fill_memory",
    "spam",
    "single-spam",
    "simple",
    "simple-slo-factor",
    "simple-parametric",
    "poisson-open-loop",
    "scalability-exp-1",
    "slo-exp-1",
    "slo-exp-2",
    "comparison_experiment",
    "comparison_experiment2",
    "azure",
    "azure_scalability_exp",
    "bursty_experiment",
    "azure_half",
    "azure_small",
    "azure_single",
    "azure_fast",
)
OURS = ("rate-exp", "rate-list", "gamma", "ramp", "on-off", "zipf", "mix", "replay", "cascade")


def test_every_published_workload_is_there_and_ours() -> None:
    assert {kind.name for kind in KINDS} == {*PUBLISHED, *OURS}
    assert len(KINDS) == len(WORKLOADS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_workload_explains_itself(kind: Kind) -> None:
    assert kind.summary.endswith(".") and kind.text.endswith(".") and kind.examples
    needed = [p.default is None for p in kind.parameters]
    assert needed == sorted(needed, reverse=True)  # those with a default come last
    assert all(p.help and p.name == p.name.upper() and "_" not in p.name for p in kind.parameters)
    for example in kind.examples:
        if kind.name == "replay":
            continue  # its log is of a run that the reader made
        workload = kind.parse(example.split())
        assert workload.name == kind.name and workload.describe().startswith(f"{kind.name}: ")
        assert pickle.loads(pickle.dumps(workload)) == workload
        assert kind.parse(example.split()) == workload and len(repr(workload)) < 2000
        steps = workload.steps()
        assert steps[0].start_ns == 0 and [s.index for s in steps] == list(range(len(steps)))
        assert len(workload.groups) >= 1 and workload.models()


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_specification_loads_and_sends(
    path: Path, monkeypatch: pytest.MonkeyPatch, traces: Path
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(traces))
    workload = load_workload(path)
    assert workload.duration_ns is not None  # a file says all that a run needs
    engine = Engine(workload, seed=1)
    instances = sum(use.copies for use in workload.models())
    for _ in range(100):
        due_ns = engine.next_ns()
        if due_ns is None:
            break  # the first requests of a closed loop wait for answers
        arrival = engine.take()
        assert arrival.at_ns == due_ns and 0 <= arrival.instance < instances
        assert 0 <= engine.group(arrival) < len(engine.groups)


def test_there_is_a_specification_of_every_workload_and_figure() -> None:
    names = {path.stem for path in SPECS}
    assert {f"fig{n}{size}" for n in (5, 6, 7, 8, 9, 11) for size in ("", "-quick")} <= names
    assert {load_workload(path).name for path in SPECS} == set(WORKLOADS)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trace, so that no test makes the large one."""
    directory = tmp_path_factory.mktemp("traces")
    write_trace(directory, 1, rows=200, minutes=30, seed=1)
    return directory


def test_models_of_the_specifications_are_in_some_profile() -> None:
    zoo, v100 = load_profile("zoo61"), load_profile("v100")
    for path in SPECS:
        workload = load_workload(path)
        if cascade_of(workload) is not None:
            continue  # its programs are in a profile of the cascade's own
        uses = workload.models()
        profile = v100 if all(use.name == "resnet50_v2" for use in uses) else zoo
        assert all(profile.model(use.name) for use in uses)


# ------------------------------------------------------------------------------------ TOML tables


def test_keys_may_have_underscores_and_values_any_type() -> None:
    table = {"workload": "azure", "num_workers": 6, "use-all-models": False, "load_factor": 0.5}
    assert workload_from_table(table) == parse_workload("azure", ["6", "0", "0.5"])
    table["use-all-models"] = "false"
    assert workload_from_table(table).models() == (("resnet50_v2", 3600),)


def test_a_key_in_both_spellings_is_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text('workload = "azure"\nnum_workers = 6\nnum-workers = 7\n')
    with pytest.raises(InvalidConfig, match="num-workers and num_workers are the same key"):
        load_workload(path)


def test_the_help_of_simple_parametric_says_when_it_ends() -> None:
    assert "The run ends soon after every client has stopped. A request" in (
        WORKLOADS["simple-parametric"].text
    )


def test_any_workload_may_have_a_duration() -> None:
    simple = workload_from_table({"workload": "simple", "duration": "20s"})
    assert simple.duration_ns == 20 * NS_PER_S and "ended after 20s" in simple.describe()
    assert simple.name == "simple" and simple.groups == ("",)
    sweep = {"workload": "scalability-exp-1", "num-models": 2, "rate-min": 1, "rate-max": 4}
    sweep |= {"rate-factor": 2, "rate-op": "mul", "period": 10, "duration": 15}
    short = workload_from_table(sweep)
    assert short.duration_ns == 15 * NS_PER_S and len(short.steps()) == 2
    assert workload_from_table({**sweep, "duration": "1h"}).duration_ns == 30 * NS_PER_S
    # Where it is a parameter of its own it is that.
    gamma = {"workload": "gamma", "model": "m", "copies": 1, "rate": 1, "cv": 1, "duration": 7}
    assert workload_from_table(gamma) == parse_workload("gamma", ["m", "1", "1", "1", "7"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workload = \n", "is not a TOML file: Invalid value (at line 1, column 12)"),
        ("model = 'm'\n", "the key workload is missing; it names one of"),
        (
            'workload = "azur"\n',
            "spec.toml, line 1: unknown workload 'azur' (did you mean azure?); known: azure, ",
        ),
        (
            '# a sweep\nworkload = "gamma"\nspeed = 3\n',
            "spec.toml, line 3: unknown key of gamma 'speed'",
        ),
        (
            'workload = "gamma"\nmodel = "m"\ncopies = 2\n',
            "spec.toml: the workload gamma lacks rate, cv",
        ),
        (
            'workload = "gamma"\nmodel = "m"\ncopies = 2\nrate = "many"\ncv = 1\n',
            "spec.toml, line 4: rate must be a number, not 'many'",
        ),
        (
            'workload = "comparison_experiment"\n\nnum_models = 0\n',
            "spec.toml, line 3: num_models must be within 1..100000, not 0",
        ),
        (
            'workload = "simple"\nduration = "soon"\n',
            "spec.toml, line 2: duration: 'soon' is not a duration",
        ),
        (
            'workload = "simple"\nduration = [3]\n',
            "spec.toml, line 2: duration must be one value, not a list or a table",
        ),
        ('workload = "replay"\nlog = "gone.tsv"\n', "cannot read the log"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        load_workload(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot read the workload"):
        load_workload(tmp_path / "gone.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(InvalidConfig, match="it is not UTF-8 text"):
        load_workload(tmp_path / "latin.toml")


def test_a_path_is_relative_to_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert "188 requests" in load_workload(ROOT / "workloads" / "replay.toml").describe()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("on-off m 1 1 999ns 1s", "on: '999ns' is 999 nanoseconds, less than 1us"),
        ("on-off m 1 1 1s 1ns", "off: '1ns' is 1 nanoseconds, less than 1us"),
        ("azure 1 1 1 1 999us", "interval must be at least 1ms, not '999us'"),
        ("azure 1 1 1 1 0", "interval must be above 0"),
    ],
)
def test_periods_too_short_for_a_first_request_are_refused(command: str, words: str) -> None:
    name, *values = command.split()
    with pytest.raises(InvalidConfig, match=words):
        parse_workload(name, values)
    assert parse_workload("on-off", ["m", "1", "1000", "1us", "1us"])
    assert parse_workload("azure", ["1", "1", "1", "1", "1ms"])


@pytest.mark.parametrize(
    "command",
    [
        "slo-exp-1 m 1 poisson 1 1 {} 1e9 mul 1",
        "gamma m 1 1 1 1s {}",
        "slo-exp-2 m 1 poisson 1 1 2 2 mul 1 1 1 {}",
    ],
)
def test_slo_factors_have_a_bound(command: str) -> None:
    for factor in ("1.1e9", "1e300", "inf"):
        name, *values = command.format(factor).split()
        with pytest.raises(InvalidConfig, match=r"slo.*(1e\+09|finite)"):
            parse_workload(name, values)
    name, *values = command.format("1e9").split()
    assert parse_workload(name, values)


def test_a_synthetic_trace_is_announced_and_a_file_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], traces: Path
) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    table = {"workload": "azure", "duration": "1s"}
    for workload in (parse_workload("azure_small", []), workload_from_table(table)):
        announce_trace(workload)
        captured = capsys.readouterr()
        assert "making a synthetic trace (seed 1, 18000 functions" in captured.err
        assert not captured.out and captured.err.count("\n") == 1
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(traces))
    announce_trace(workload_from_table(table))
    announce_trace(parse_workload("simple", []))
    assert capsys.readouterr().err == ""


def test_an_unknown_workload_lists_those_there_are() -> None:
    with pytest.raises(
        UnknownName, match=r"unknown workload 'spm' \(did you mean spam\?\); known: azure, .*, zipf"
    ):
        parse_workload("spm", [])


# ------------------------------------------------------------------------------------ determinism

_PROGRAM = """
import hashlib, sys
from slosched.workloads import WORKLOADS
from slosched.workloads.engine import Engine
for kind in WORKLOADS.values():
    example = sys.argv[1] if kind.name == "replay" else kind.examples[0]
    engine = Engine(kind.parse(example.split()), seed=3, duration_ns=20 * 10**9)
    digest = hashlib.sha256()
    for _ in range(3000):
        if engine.next_ns() is None:
            break
        arrival = engine.take()
        digest.update(repr(arrival).encode())
        if arrival.seq % 2:
            engine.answered(arrival, at_ns=arrival.at_ns + 5, ok=False, deadline_ns=arrival.at_ns + 9)
    print(kind.name, digest.hexdigest())
"""


def test_arrivals_are_the_same_under_any_hash_seed(traces: Path) -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(ROOT / "workloads" / "recorded.tsv")],
            env={"PYTHONHASHSEED": hash_seed, DIRECTORY_VARIABLE: str(traces)},
            capture_output=True,
            check=True,
            timeout=100,
        ).stdout
        for hash_seed in ("0", "1")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == len(WORKLOADS)
