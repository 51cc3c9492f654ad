"""Deft's files, HotCarbon's command line and TOML files become the same kind of experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from slosched.errors import InvalidConfig
from slosched.share.deft_config import parse_deft, read_deft
from slosched.share.hotcarbon import model_jobs, parse_modes
from slosched.share.spec_check import check_spec, command_job
from slosched.share.spec_file import read_spec, spec_text
from slosched.share_spec import (
    Arriving,
    Boundary,
    BoundaryKind,
    Clients,
    Job,
    Mode,
    Policy,
    Run,
    ShareSpec,
    Stop,
)

CONFIGS = Path(__file__).parent / "deft_configs"
S = 1_000_000_000


# ------------------------------------------------------------------------------------------- Deft


@pytest.mark.parametrize(
    ("name", "mode", "kinds"),
    [
        ("input", Mode.TM, [("none", 1), ("none", 1)]),
        ("input_control", Mode.GATE, [("none", 1), ("none", 1)]),
        ("input_controlsync", Mode.GATE, [("sync", 1), ("none", 1)]),
        ("input_controlevent", Mode.GATE, [("event", 2), ("none", 1)]),
        ("1model", Mode.GATE, [("event", 2)]),
        ("3models", Mode.GATE, [("none", 1)] * 3),
    ],
)
def test_each_configuration_that_deft_ships_is_an_experiment(
    name: str, mode: Mode, kinds: list[tuple[str, int]]
) -> None:
    found = read_deft(CONFIGS / f"{name}.json")
    spec = found.spec
    assert spec.modes == (mode,)
    assert [(job.boundary.kind.value, job.boundary.every) for job in spec.jobs] == kinds
    assert (spec.duration_ns, spec.device, spec.least_jobs) == (30 * S, "cuda:1", 10)
    assert spec.stop is Stop.FINISH
    assert [job.name for job in spec.jobs] == ["model_A", "model_B", "model_C"][: len(kinds)]
    assert [str(log) for log in found.logs] == [f"logs/{job.name}.csv" for job in spec.jobs]
    first = spec.jobs[0]
    assert (first.model, first.batch, first.size) == ("fasterrcnn_resnet50_fpn", 1, (1440, 2560))
    assert (first.priority, first.warmups, first.run) == (0, 1, Run.EAGER)
    assert first.slo_times_solo == 1.6 and first.clients == Clients()
    assert all(warning.startswith(str(CONFIGS)) for warning in found.warnings)
    if name != "1model":
        assert not found.warnings
        assert spec.jobs[1].clients.think_ns == S and spec.jobs[1].priority == 1


def test_an_image_is_resized_only_where_the_file_says_so() -> None:
    sizes = {
        name: read_deft(CONFIGS / f"{name}.json").spec.jobs[1].size
        for name in ("input", "input_control")
    }
    assert sizes == {"input": (720, 1280), "input_control": (0, 0)}


def deft(model: str = "", top: str = '"exp_dur": 5, "device_id": 0') -> str:
    return f'{{"models": [{{"model_name": "gpt2", "sleep_time": 0{model}}}], {top}}}'


def test_commas_and_comments_are_tolerated_outside_texts_alone() -> None:
    text = """{ // two models
      "models": [{"model_name": "gpt2", "sleep_time": 0.25, /* a
        longer one, */ "output_file_name": "a",
        "input_file_path": "x,] // /* \\", }", },],
      "exp_dur": 1.5, "device_id": 2, // the end
    }"""
    spec = parse_deft(text).spec
    assert (spec.duration_ns, spec.device) == (S * 3 // 2, "cuda:2")
    assert spec.jobs[0].clients.think_ns == S // 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "models": [\n  {"model_name" 1}]}', "line 3, column 17: expecting ':' delimiter"),
        ('{"models": [{"a": "\\q"}]}', "line 1, column 20: invalid \\escape"),
        ('{"models": [1,,2]}', "line 1, column 15: expecting value"),
        ('{"models": "unended', "line 1, column 12: unterminated string"),
        ("[]", "must be an object"),
        ("{}", '"models" must be a list'),
        ('{"models": []}', '"models" must be a list'),
        ('{"models": [3]}', "objects alone"),
        (
            deft(top='"device_id": 0'),
            "exp_dur must be a number of seconds within 0.001..1000000, and is missing",
        ),
        (deft(top='"exp_dur": NaN'), "NaN is not a number of JSON"),
        (deft(top='"exp_dur": -3'), "not -3"),
        (deft(top='"exp_dur": 3, "device_id": "1"'), "device_id must be a whole number"),
        (deft(', "priority": -1'), "models[0]: priority must be a whole number"),
        (deft(', "priority": true'), "models[0]: priority must be a whole number"),
        (deft(', "batch_size": 0'), "models[0]: batch_size must be"),
        (deft(', "resize": true'), "models[0]: resize_size must be [height, width], not None"),
        (deft(', "resize": 1'), "models[0]: resize must be true or false"),
        (deft(', "sync_level": "all"'), 'sync_level must be "", "layer" or "kernel"'),
        (deft(', "control": []'), "models[0]: control must be an object"),
        (
            deft(', "control": {"control": true, "controlsync": true, "queue_limit": {"sync": 0}}'),
            "models[0]: control.queue_limit.sync must be a whole number within 1..",
        ),
        (
            '{"models": [{"model_name": "a/../b", "sleep_time": 0}], "exp_dur": 1}',
            "model 'a/../b' is not a model's name",
        ),
        ('{"models": [{"model_name": "gpt2"}], "exp_dur": 1}', "sleep_time must be"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_in_a_file_of_deft_is_named(text: str, said: str) -> None:
    with pytest.raises(InvalidConfig) as error:
        parse_deft(text, "exp.json")
    assert str(error.value).startswith("exp.json: ") and said in str(error.value)


def test_unknown_keys_and_what_has_no_effect_are_warned_of() -> None:
    found = parse_deft(
        deft(
            ', "prioritty": 1, "priority": "27", "control": {"control": true, "contrlsync": true, '
            '"queue_limit": {"depth": 1}}, "sync_level": "layer"',
            top='"exp_dur": 5, "exp_dur": 6',
        ),
        "exp.json",
    )
    said = "\n".join(found.warnings)
    for part in (
        "models[0]: unknown key 'prioritty' (did you mean priority?)",
        "models[0].control: unknown key 'contrlsync' (did you mean controlsync?)",
        "models[0].control.queue_limit: unknown key 'depth'",
        "priority 27 counts as 2",
        "'exp_dur' stands twice",
        "device_id is missing",
    ):
        assert part in said
    assert found.spec.duration_ns == 6 * S and found.spec.jobs[0].priority == 2
    assert found.spec.jobs[0].boundary.kind is BoundaryKind.LAYER


def test_the_event_library_wins_and_jobs_of_one_name_get_numbers() -> None:
    model = (
        '{"model_name": "gpt2", "sleep_time": 0, "output_file_name": "m", "control": {"control": true, '
        '"controlsync": true, "controlEvent": true, "queue_limit": {"sync": 3, "event_group": 7}}}'
    )
    spec = parse_deft(f'{{"models": [{model}, {model}], "exp_dur": 1, "device_id": 0}}').spec
    assert spec.jobs[0].boundary == Boundary(kind=BoundaryKind.EVENT, every=7, depth=2)
    assert [job.name for job in spec.jobs] == ["m", "m_2"]


def test_a_file_that_is_not_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"cannot read the configuration .*no\.json"):
        read_deft(tmp_path / "no.json")


# -------------------------------------------------------------------------------------- HotCarbon


def hotcarbon_spec(models: list[str], **fields: Any) -> ShareSpec:
    return check_spec(ShareSpec(jobs=model_jobs(models), **fields))


def test_the_seeds_command_is_an_experiment() -> None:
    spec = hotcarbon_spec(
        ["diffusion-1", "whisper-1"],
        label="a100",
        device="cuda:1",
        modes=parse_modes("tm"),
        duration_ns=20 * S,
    )
    assert [(job.name, job.model, job.batch) for job in spec.jobs] == [
        ("diffusion", "diffusion", 1),
        ("whisper", "whisper", 1),
    ]
    assert (spec.device, spec.label, spec.modes) == ("cuda:1", "a100", (Mode.TM,))
    default = hotcarbon_spec(["bert-1"], label="my-card.2")
    assert default.modes == (Mode.MPS, Mode.TM) and default.duration_ns == 120 * S


def test_a_model_may_be_named_twice_and_any_batch_stands_behind_the_last_dash() -> None:
    spec = hotcarbon_spec(
        ["bert-1", "bert-16", "bert_2-1", "gpt-j-6b-4", "tiny:4:2-1", "timm/x-8"], label="x"
    )
    assert [(job.name, job.model, job.batch) for job in spec.jobs] == [
        ("bert", "bert", 1),
        ("bert_2", "bert", 16),
        ("bert_2_2", "bert_2", 1),
        ("gpt-j-6b", "gpt-j-6b", 4),
        ("tiny_4_2", "tiny:4:2", 1),
        ("timm_x", "timm/x", 8),
    ]


@pytest.mark.parametrize(
    "text", ["bert", "bert-", "-1", "bert-0", "bert-x", "a//b-1", "a/../b-1", "/a-1", "bert-1 ", ""]
)
def test_what_is_not_model_and_batch_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfig):
        hotcarbon_spec([text], label="x")


def test_modes_are_named_once_each_in_the_given_order() -> None:
    assert parse_modes("tm,mps-uncap,mps, tm") == (Mode.TM, Mode.MPS)
    assert parse_modes(",".join(Mode)) == tuple(Mode)
    with pytest.raises(InvalidConfig, match=r"unknown mode 'mig'.*mps-uncap"):
        parse_modes("mig")
    with pytest.raises(InvalidConfig, match="no mode"):
        parse_modes(" ,")


@pytest.mark.parametrize("label", ["", "../x", "a b", "a/b", "x" * 101, ".."])
def test_a_label_is_a_name_of_a_folder(label: str) -> None:
    with pytest.raises(InvalidConfig, match="label"):
        hotcarbon_spec(["bert-1"], label=label)


# ------------------------------------------------------------------------------------- TOML files


def everything() -> ShareSpec:
    """An experiment in which every field differs from its default."""
    low = Job(
        name="low-1",
        model="fasterrcnn_resnet50_fpn",
        batch=8,
        size=(720, 1280),
        dtype="float16",
        run=Run.EAGER,
        priority=3,
        clients=Clients(think_ns=250_000_001, concurrency=4),
        count=7,
        start_after_ns=3 * S,
        warmups=5,
        slo_ns=1,
        boundary=Boundary(kind=BoundaryKind.EVENT, every=3, depth=5, tuned=True),
        thread_percentage=40,
    )
    other = Job(
        name="open",
        model="bert",
        clients=Clients(arriving=Arriving.GAMMA, rate_per_s=2.5, cv=3.0),
        slo_times_solo=1.25,
    )
    traced = Job(
        name="traced",
        model="bert",
        clients=Clients(arriving=Arriving.TRACE, trace=(0.0, 0.1, 1e-06)[:2]),
    )
    program = Job(name="own", model="python3", command=("python3", "-c", 'print("\\n\ta")'))
    return ShareSpec(
        jobs=(low, other, traced, program),
        modes=(Mode.TM, Mode.EXCLUSIVE),
        policy=Policy.LEAST_SLACK,
        duration_ns=1_234_567_891,
        device="emulated",
        label="h200",
        repeats=3,
        seed=17,
        stop=Stop.CUT,
        least_jobs=4,
        linger_ns=150_000,
        idle_ns=0,
        cool_down_ns=1,
        power_every_ns=10_000_000,
        prepare_within_ns=90 * S,
        finish_within_ns=3600 * S,
        profile="some.toml",
    )


def test_a_toml_file_says_every_field_and_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = everything()
    for value in (spec, *(job for job in spec.jobs)):
        assert value == msgspec.convert(msgspec.to_builtins(value), type(value))
    file = tmp_path / "exp.toml"
    file.write_text(spec_text(spec))
    assert read_spec(file) == spec
    top = {name for name in ShareSpec.__struct_fields__ if name != "jobs"}
    written = {
        line.partition(" = ")[0] for line in spec_text(spec).partition("[[jobs]]")[0].split("\n")
    }
    assert {name.removesuffix("_ns") for name in top} == written - {""}


@pytest.mark.parametrize("name", [file.stem for file in sorted(CONFIGS.glob("*.json"))])
def test_each_front_door_can_be_written_as_toml(name: str, tmp_path: Path) -> None:
    specs = [
        read_deft(CONFIGS / f"{name}.json").spec,
        hotcarbon_spec(["gpt-1", "gpt-2"], label="a"),
    ]
    for spec in specs:
        file = tmp_path / "exp.toml"
        file.write_text(spec_text(spec))
        assert read_spec(file) == spec


def test_the_short_form_has_names_from_models_and_traces_from_files(tmp_path: Path) -> None:
    (tmp_path / "arrivals.csv").write_text("time_s,who\n0.5,a\n\n0.75,b\n")
    file = tmp_path / "exp.toml"
    file.write_text(
        'modes = ["mps-uncap"]\nduration = "20s"\n[[jobs]]\nmodel = "bert"\n[[jobs]]\nmodel = "bert"\n'
        'clients = { trace = "arrivals.csv" }\n[[jobs]]\ncommand = ["/bin/sleep", "1"]\n'
    )
    spec = read_spec(file)
    assert [job.name for job in spec.jobs] == ["bert", "bert_2", "sleep"]
    assert spec.jobs[1].clients == Clients(arriving=Arriving.TRACE, trace=(0.5, 0.75))
    assert spec.modes == (Mode.MPS,) and spec.jobs[2].command == ("/bin/sleep", "1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'duratoin = "3s"\n[[jobs]]\nmodel="bert"',
            ", line 1: unknown key 'duratoin' (did you mean dur",
        ),
        (
            '[[jobs]]\nmodel="bert"\nbatsh = 1',
            ", line 3: job 1: unknown key 'batsh' (did you mean batch",
        ),
        (
            '[[jobs]]\nmodel="a"\n[[jobs]]\nmodel="b"\nclients = { thnk = "1s" }',
            ", line 5: job 2, clients: unknown key 'thnk' (did you mean think?)",
        ),
        (
            'duration = 20\n[[jobs]]\nmodel="bert"',
            "line 1: duration must be a duration with a unit",
        ),
        ('duration = "0s"\n[[jobs]]\nmodel="bert"', "duration must be within 0.001s"),
        ('modes = "tm"\n[[jobs]]\nmodel="bert"', 'modes must be a list, such as ["tm", "mps"]'),
        ('modes = ["mig"]\n[[jobs]]\nmodel="bert"', "modes must be one of exclusive, tm,"),
        ("jobs = 3", "write each job as a table [[jobs]]"),
        ("", "no jobs"),
        ("[[jobs]]\nbatch=1", "line 1: job 1: model must be given"),
        (
            '[[jobs]]\nmodel="bert"\nbatch = "1"',
            "line 3: job 1: batch must be a whole number, not '1'",
        ),
        ('[[jobs]]\nmodel="bert"\nbatch = true', "batch must be a whole number, not True"),
        ('[[jobs]]\nmodel="bert"\nsize = 3', "size must be [height, width]"),
        ('[[jobs]]\nmodel="bert"\nclients = 3', "clients must be a table"),
        ('[[jobs]]\nmodel="bert"\nname = "a/b"', "a name has letters"),
        (
            '[[jobs]]\nmodel="bert"\nclients={arriving="poisson"}',
            "poisson arrivals need rate_per_s",
        ),
        ('[[jobs]]\nmodel="bert"\nclients={trace="no.csv"}', "cannot read the trace"),
        ('[[jobs]]\nmodel="bert"\nclients={trace=[2.0, 1.0]}', "time 2 of trace is 1"),
        (
            '[[jobs]]\nmodel="bert"\nboundary={kind="layer", tuned=true}',
            "a tuned boundary is of kind segment, sync or event, not layer",
        ),
        (
            '[[jobs]]\nmodel="bert"\nslo="1ms"\nslo_times_solo=2.0',
            "slo or slo_times_solo, not both",
        ),
        ("[[jobs", "is not a TOML file"),
    ],
)
def test_what_is_wrong_in_a_toml_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "exp.toml"
    file.write_text(text)
    with pytest.raises(InvalidConfig) as error:
        read_spec(file)
    assert said in str(error.value) and str(tmp_path) in str(error.value)


# ----------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"jobs": ()}, "no jobs"),
        ({"modes": ()}, "modes"),
        ({"modes": (Mode.TM, Mode.TM)}, "mode tm is named twice"),
        ({"device": "gpu"}, "device must be"),
        ({"repeats": 0}, "repeats"),
        ({"seed": -1}, "seed"),
        ({"jobs": (Job(name="a", model="b"),) * 2}, "job a is named twice"),
        ({"jobs": tuple(Job(name=f"a{n}", model="b") for n in range(65))}, "65 jobs"),
        ({"jobs": (Job(name="a", model="b", thread_percentage=101),)}, "job a: thread_percentage"),
        ({"jobs": (Job(name="a", model="b", slo_times_solo=float("nan")),)}, "slo_times_solo"),
        ({"jobs": (Job(name="a", model="b", command=("x",)),)}, "name a model beside"),
    ],
)
def test_an_impossible_experiment_is_refused(changes: dict[str, Any], said: str) -> None:
    plain = ShareSpec(jobs=(Job(name="a", model="b"),))
    assert check_spec(plain) is plain
    with pytest.raises(InvalidConfig, match=said):
        check_spec(msgspec.structs.replace(plain, **changes))


def test_a_program_stands_beside_models_where_it_has_a_process_of_its_own() -> None:
    program = command_job(("/usr/bin/my prog.py", "-x"), ["my_prog.py"])
    assert (program.name, program.command) == ("my_prog.py_2", ("/usr/bin/my prog.py", "-x"))
    spec = ShareSpec(jobs=(Job(name="a", model="b"), program))
    assert check_spec(spec) is spec
    with pytest.raises(InvalidConfig, match="which preempt cannot hold"):
        check_spec(msgspec.structs.replace(spec, modes=(Mode.TM, Mode.PREEMPT)))
    for words in ((), ("",)):
        with pytest.raises(InvalidConfig, match="no COMMAND"):
            command_job(words, [])
