"""`slosched share`: what its commands read, print and exit with."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from slosched.cli.app import app
from slosched.cli.share_log import share_log
from slosched.cli.share_table import run_line, runs_table
from slosched.errors import InvalidConfig
from slosched.share.metrics import metrics_of
from slosched.share.spec_file import read_spec
from slosched.share_spec import Job, JobResult, Mode, Request, Run, RunResult, ShareSpec, Status

CONFIGS = Path(__file__).parent / "deft_configs"
MS, S = 1_000_000, 1_000_000_000


@pytest.fixture(autouse=True)
def logs_beside_the_test(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


def ran(*words: str) -> Result:
    return CliRunner().invoke(app, ["share", *words], prog_name="slosched")


def spec_of(tmp_path: Path, *words: str) -> ShareSpec:
    done = ran("spec", *words)
    assert done.exit_code == 0, done.output
    file = tmp_path / "exp.toml"
    file.write_text(done.stdout)
    return read_spec(file)


# ------------------------------------------------------------------------------------- experiments


def test_hotcarbons_command_line_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_SUDO", "1")
    monkeypatch.setenv("VENV", "/no/such/place")
    seed = "--device-type a100 --device-id 1 --modes tm --duration 20 diffusion-1 whisper-1"
    spec = spec_of(tmp_path, *seed.split())
    assert [f"{job.model}-{job.batch}" for job in spec.jobs] == ["diffusion-1", "whisper-1"]
    assert (spec.label, spec.device, spec.modes) == ("a100", "cuda:1", (Mode.TM,))
    assert spec.duration_ns == 20 * S


def test_options_go_before_the_file_and_a_program_stands_behind_dashes(tmp_path: Path) -> None:
    words = ["-f", str(CONFIGS / "input.json"), "--device-id", "3", "--duration", "10s"]
    words += ["--run", "auto", "--seed", "7", "--power-interval", "100ms", "--idle", "0"]
    words += ["--linger", "100us"]
    spec = spec_of(tmp_path, *words, "--", "python", "--seed", "9")
    assert (spec.device, spec.duration_ns, spec.seed) == ("cuda:3", 10 * S, 7)
    assert (spec.power_every_ns, spec.idle_ns, spec.linger_ns) == (100 * MS, 0, MS // 10)
    assert [job.run for job in spec.jobs] == [Run.AUTO] * 3
    assert spec.jobs[2].command == ("python", "--seed", "9") and not spec.jobs[0].command


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ("--device cpu", "cpu"),
        ("--device emulated", "emulated"),
        ("--device cpu --device-type mine", "mine"),
        ("", "gpu"),
    ],
)
def test_a_device_without_a_label_is_called_by_its_kind(
    words: str, label: str, tmp_path: Path
) -> None:
    assert spec_of(tmp_path, *words.split(), "bert-1").label == label


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("spec", "no models: name them with their batch sizes"),
        ("spec bert", "'bert' is not MODEL-BATCH"),
        ("spec -f {0} bert-1", "name either the file or models"),
        ("spec -f no.json", "cannot read the configuration no.json"),
        ("spec -f no.toml", "cannot read the experiment no.toml"),
        ("spec --modes mig bert-1", "unknown mode 'mig'"),
        ("spec --policy best bert-1", "--policy must be one of fcfs,"),
        ("spec --run fast bert-1", "--run must be one of"),
        ("spec --device gpu bert-1", "device must be cuda:N"),
        ("spec --device cuda:1 --device-id 2 bert-1", "contradict"),
        ("spec --duration 0 bert-1", "--duration: '0' is too short"),
        ("spec --power-interval -1s bert-1", "--power-interval: '-1s' is negative"),
        ("spec --modes preempt bert-1 -- ls", "ls is a program of its own"),
        ("spec bert-1 --", "no COMMAND behind --"),
        ("spec --linger 1s bert-1", "linger must be within 0..10ms"),
        ("spec --linger -1us bert-1", "--linger: '-1us' is negative"),
        ("spec --modes tm,gate --run graphs bert-1", "has no gate, which stops eager models"),
        ("spec --device-id -1 bert-1", "invalid value for '--device-id'"),
        ("spec --device-type a/b bert-1", "label 'a/b'"),
        ("spec --duratoin 3 bert-1", "no such option: --duratoin"),
        ("run --layout mine bert-1", "--layout must be slosched or hotcarbon"),
        ("run --out {0} bert-1", "is not a directory"),
        ("rnu", "unknown command 'rnu'; known: "),
    ],
)
def test_wrong_words_are_one_line_with_exit_code_2(words: str, said: str) -> None:
    ended = ran(*words.format(CONFIGS / "input.json").split())
    assert ended.exit_code == 2 and ended.stdout == ""
    assert said in ended.stderr and ended.stderr.startswith("slosched: error: ")


# -------------------------------------------------------------------------------- the seed's lines


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (InvalidConfig("x"), 2),
        (typer.Exit(1), 1),
        (KeyboardInterrupt(), 130),
        (ValueError("x"), 70),
    ],
)
def test_the_last_lines_say_how_the_command_ends(error: BaseException | None, code: int) -> None:
    lines: list[str] = []

    def use() -> None:
        with share_log(lines.append) as log:
            log.say("Running closed loop experiment for tm")
            log.note("unseen")
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(type(error)):
            use()
    first = re.fullmatch(r"Logs at (.*/print_outs-[0-9a-f]{8}\.txt)", lines[0])
    assert first is not None
    path = Path(first[1])
    try:
        assert lines[1:] == [
            "Running closed loop experiment for tm",
            f"Exiting with error_code={code} (0 is clean exit)",
            f"Examine {path} for logs",
        ]
        written = path.read_text()
        assert "unseen" in written and all(line in written for line in lines)
    finally:
        path.unlink()


# ------------------------------------------------------------------------------------------ tables


def test_the_table_has_a_row_for_each_job_and_a_line_for_each_run() -> None:
    spec = ShareSpec(
        jobs=(Job(name="a", model="bert", slo_ns=15 * MS), Job(name="b", model="gpt")), label="x"
    )

    def result(mode: Mode, each_ms: int, n: int, *jobs: int) -> RunResult:
        rows = tuple(
            Request(job=0, number=i, arrived_ns=s, started_ns=s, ended_ns=s + each_ms * MS)
            for i, s in ((i, i * each_ms * MS) for i in range(n))
        )
        found = [JobResult(job=0, requests=rows)]
        if 1 in jobs:
            found.append(JobResult(job=1, status=Status.OUT_OF_MEMORY, reason="no \x1b[2Jroom\n"))
        return RunResult(
            mode=mode, repeat=0, jobs=tuple(found), begin_ns=0, end_ns=S, power_problem="no NVML"
        )

    alone = result(Mode.EXCLUSIVE, 10, 100)
    shared = result(Mode.TM, 20, 50, 1)
    runs = [metrics_of(spec, shared, {0: alone})]
    [heading, first, second, *_] = runs_table(runs).splitlines()
    assert heading.split()[:3] == ["mode", "job", "n"]
    cells = first.split()
    # 50 requests of 20 ms in 1 s; alone 100 of 10 ms: half the throughput, twice the latency, all late.
    assert cells[:7] == ["tm", "a", "50", "50", "20", "20", "max"]
    assert cells[7:9] == ["0.500", "2.000"] and "50 (100 %)" in first
    assert "b (out of memory)" in second
    line = run_line(runs[0])
    assert line.startswith("tm: ") and "energy unknown: no NVML" in line
    assert line.endswith("b: out of memory: no ?[2Jroom ")
    assert "all jobs were there for 1 s of 120 s alone" in line
    whole = msgspec.structs.replace(shared, end_ns=119 * S)
    assert "all jobs were there" not in run_line(metrics_of(spec, whole, {0: alone}))
    assert "all jobs were there" not in run_line(metrics_of(spec, alone))
    cut = msgspec.structs.replace(shared, about={"stopped": "by the caller"})
    assert run_line(metrics_of(spec, cut)).startswith("tm: stopped after 1 s; ")


def test_wrong_answers_have_a_column_where_there_are_some() -> None:
    spec = ShareSpec(jobs=(Job(name="a", model="bert"),))

    def table(*wrong: int) -> list[str]:
        rows = tuple(
            Request(
                job=0,
                number=i,
                arrived_ns=i * 20 * S,
                started_ns=i * 20 * S,
                ended_ns=(i + 1) * 20 * S,
                differs=i in wrong,
            )
            for i in range(5)
        )
        jobs = (JobResult(job=0, requests=rows),)
        result = RunResult(mode=Mode.TM, repeat=0, jobs=jobs, begin_ns=0, end_ns=100 * S)
        metrics = metrics_of(spec, result)
        assert metrics.jobs[0].wrong_answers == len(wrong)
        return runs_table([metrics]).splitlines()

    heading, row, explained = table(1, 3)
    assert heading.endswith("wrong answers") and row.split()[-1] == "2"
    assert "not that of the job's first request" in explained
    # Latencies of 20,000 ms are written with all their digits.
    assert row.split()[4:6] == ["20000", "20000"]
    heading, _, explained = table()
    assert "wrong" not in heading + explained


def test_a_mode_that_the_machine_lacks_says_why() -> None:
    spec = ShareSpec(jobs=(Job(name="a", model="bert"),))
    lacking = RunResult(
        mode=Mode.MPS, repeat=0, jobs=(), begin_ns=0, end_ns=0, unavailable="no MPS here"
    )
    run = metrics_of(spec, lacking)
    assert run_line(run) == "mps: unavailable: no MPS here" and runs_table([run]) == ""


# ------------------------------------------------------------------------------------------ pictures


def test_defts_picture_is_drawn_with_defts_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    header = (
        "start_timestamp_ns,end_timestamp_ns,jct_ms,max_allocated_gpu_memory_allocated_byte,"
        "max_reserved_gpu_memory_byte\n"
    )
    for name in "AB":
        rows = [f"{n * S},{n * S + 50 * MS},50.0,1,2\n" for n in range(1, 5)]
        Path(f"model_{name}.csv").write_text(header + "".join(rows))
    words = ["plot-jct", "--model-A-jct-log", "model_A.csv", "--model-B-jct-log", "model_B.csv"]
    done = ran(*words)
    assert done.exit_code == 0, done.output
    assert Path("jct_vs_t.jpg").read_bytes()[:2] == b"\xff\xd8"
    done = ran(*words, "--save-dir", "figures", "--json")
    assert done.exit_code == 0 and Path("figures/jct_vs_t.jpg").exists()
    lacking = ran(*words[:2], "no.csv", *words[3:])
    assert lacking.exit_code == 2 and "no.csv" in lacking.stderr


def test_only_the_kinds_of_figures_that_are_asked_for_are_drawn(tmp_path: Path) -> None:
    words = ["--modes", "tm", "--duration", "5", "bert-1", "whisper-1"]
    assert ran("simulate", "--out", str(tmp_path / "a"), *words).exit_code == 0
    figures = tmp_path / "figures"
    drawn = ran(
        *("plot", str(tmp_path / "a"), "--out", str(figures), "--only", "jct", "--singles", "1")
    )
    assert drawn.exit_code == 0, drawn.output
    assert [file.name for file in figures.glob("*.png")] == ["jct_bert+whisper_tm.png"]
    wrong = ran("plot", str(tmp_path / "a"), "--only", "mode")
    assert wrong.exit_code == 2 and "did you mean modes?" in wrong.stderr


# ------------------------------------------------------------------------------------- whole commands


def emulated(tmp_path: Path, *words: str) -> Result:
    return ran("run", "--device", "emulated", "--out", str(tmp_path / "out"), *words)


def test_the_seeds_command_prints_the_seeds_lines_and_leaves_seven_files(tmp_path: Path) -> None:
    words = "--device-type a100 --device-id 1 --modes tm --duration 20 diffusion-1 whisper-1"
    done = emulated(tmp_path, *words.split())
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    log = Path(lines[0].removeprefix("Logs at "))
    try:
        mix = tmp_path / "out/a100/diffusion-whisper/diffusion-1_whisper-1"
        assert lines[1] == "Running closed loop experiment for tm"
        assert lines[-3:] == [
            f"Run success: results are stored in {mix}",
            "Exiting with error_code=0 (0 is clean exit)",
            f"Examine {log} for logs",
        ]
        assert log.read_text().count("closed loop") == 1
    finally:
        log.unlink()
    names = ["tput", *(f"total_p{p}" for p in (0, 50, 90, 99, 100)), "pwr"]
    assert all((mix / "tm/r0" / f"{name}.csv").is_file() for name in names)
    header = (mix / "tm/r0/tput.csv").read_text().splitlines()[0]
    assert header == "mode,load,0_diffusion-1,1_whisper-1"


def test_defts_files_are_run_and_leave_logs_where_deft_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = emulated(tmp_path, "-f", str(CONFIGS / "input_controlevent.json"), "--duration", "5s")
    assert done.exit_code == 0, done.output
    first = Path("logs/model_A.csv").read_text().splitlines()
    assert first[0].startswith("start_timestamp_ns,end_timestamp_ns,jct_ms,")
    start, end, jct = first[1].split(",")[:3]
    assert (int(end) - int(start)) / MS == pytest.approx(float(jct))
    assert Path("logs/model_B.csv").is_file() and Path("logs/models_pid.json").is_file()
    # Two jobs of one model and batch, of which only the size differs, each have a run alone.
    assert len(list((tmp_path / "out").rglob("exclusive/r0/run.json"))) == 2


def test_a_place_of_logs_that_cannot_be_written_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("logs").write_text("not a folder")
    done = emulated(tmp_path, "-f", str(CONFIGS / "input.json"))
    assert done.exit_code == 2 and "logs is not a directory" in done.stderr
    assert not (tmp_path / "out").exists() and Path("logs").read_text() == "not a folder"


def test_modes_that_are_lacking_say_why_and_the_others_run(tmp_path: Path) -> None:
    words = ["run", "--device", "cpu", "--modes", "mps,preempt", "--no-solo", "--duration", "1s"]
    ended = ran(*words, "--out", str(tmp_path), "tiny:1:1-1")
    assert ended.exit_code == 1  # not one of them ran
    assert "mps: unavailable: it is a service" in ended.stdout
    assert "preempt: unavailable: the serving lane" in ended.stdout
    assert "Exiting with error_code=1 (0 is clean exit)" in ended.stdout
    unknown = ran("run", "--device", "cpu", "--modes", "tm", "brt-1")
    assert unknown.exit_code == 2 and "did you mean bert?" in unknown.stderr


def test_results_are_read_simulated_and_compared_again(tmp_path: Path) -> None:
    words = ["--modes", "tm,mps", "--duration", "10", "bert-1", "whisper-1"]
    made = ran("simulate", "--profile", "a6000", "--out", str(tmp_path / "a"), *words)
    assert made.exit_code == 0 and "nothing ran: times" in made.stdout
    read = ran("import", str(tmp_path / "a"))
    assert read.exit_code == 0 and "bert+whisper" in read.stdout
    beside = ran("compare", str(tmp_path / "a"), "--published", "a6000-tm,a6000-mps", "--json")
    assert beside.exit_code == 0, beside.output
    published = json.loads(beside.stdout)["A6000 mps-uncap (published)"]["bert+whisper"]
    assert published[0] == pytest.approx(1.94, abs=0.01)  # HotCarbon's STP of this pair
    one = ran("import", str(tmp_path / "a/gpu/bert-whisper/bert-1_whisper-1/tm/r0"))
    assert one.exit_code == 0 and "whisper" in one.stdout
    assert ran("import", str(tmp_path / "no")).exit_code == 2


def test_a_simulated_job_that_does_not_end_has_exit_code_1(tmp_path: Path) -> None:
    file = tmp_path / "late.toml"
    file.write_text(
        'duration = "1s"\nfinish_within = "1s"\nmodes = ["tm"]\n[[jobs]]\nmodel = "diffusion"\n'
    )
    done = ran("simulate", "-f", str(file), "--out", str(tmp_path / "a"))
    assert done.exit_code == 1 and "diffusion: timed out" in done.stdout
    assert "Run success" not in done.stdout and "error_code=1" in done.stdout
    assert (tmp_path / "a/gpu/diffusion/diffusion-1/tm/r0/summary.json").is_file()


def test_a_sweep_varies_keys_of_a_file_and_keeps_what_is_done(tmp_path: Path) -> None:
    file = tmp_path / "exp.toml"
    file.write_text(
        'modes = ["tm"]\nduration = "5s"\ndevice = "emulated"\n'
        '[[jobs]]\nmodel = "bert"\n[[jobs]]\nmodel = "gpt"\n'
    )
    words = ["sweep", str(file), "--vary", "jobs.0.batch=1,4", "--simulate", "--no-figures"]
    words += ["--out", str(tmp_path / "out")]
    for kept in (False, True):
        done = ran(*words)
        assert done.exit_code == 0, done.output
        assert ("2 of 2 points are done already" in done.stdout) is kept
    rows = (tmp_path / "out/sweep.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].startswith("point,")
    assert (tmp_path / "out/batch_1/emulated").is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sweep nonsense", "unknown preset 'nonsense'"),
        ("sweep hotcarbon --vary seed=1,2", "has its own points"),
        ("sweep hotcarbon --models bert", "are chosen for the preset pairs"),
        ("sweep no.toml --vary seed=1,2", "cannot read the experiment"),
        ("sweep no.toml --tiny", "go with a preset"),
        ("sweep hotcarbon --run fast", "--run must be one of"),
        ("sweep pairs --simulate --models ,", "--models: ',' names no model"),
        ("sweep pairs --simulate --models bert,gpt,bert", "--models: bert is named twice"),
        ("compare no", "is not a folder of results"),
        ("plot no", "is not a directory"),
        ("simulate --profile nonsense bert-1", "there is no solo profile 'nonsense'"),
        (
            "simulate --duration 100h bert-1 gpt-1",
            "some 136,778,116 requests in virtual time",
        ),
        ("run --device cpu --modes tm tiny:1:1-1 -- no-such-program", "there is no program"),
        ("run --device emulated --profile prof\udcff bert-1", "profile must be UTF-8"),
        ("run --device emulated bert--1", "'bert--1' is not MODEL-BATCH"),
        ("run -f /dev/zero", "it is a device; name a file"),
        ("run --device emulated --out /proc/none bert-1", "cannot make the folder /proc/none"),
        ("simulate --out /dev/full/x bert-1", "/dev/full"),
    ],
)
def test_wrong_words_of_the_other_commands_have_exit_code_2(words: str, said: str) -> None:
    ended = ran(*words.split())
    assert ended.exit_code == 2 and said in ended.stderr


@pytest.mark.processes
@pytest.mark.torch
def test_processes_on_the_cpu_run_beside_a_program(tmp_path: Path) -> None:
    words = ["run", "--device", "cpu", "--modes", "tm", "--no-solo", "--duration", "300ms"]
    words += ["--idle", "0", "--cool-down", "0", "--out", str(tmp_path), "tiny:1:1-1"]
    # A program that runs to the end of the window: tests/test_share_member.py.
    failed = ran(*words, "--", "sh", "-c", "exit 3")
    assert failed.exit_code == 1 and "sh: failed: it ended with exit code 3" in failed.stdout
    row = next(line for line in failed.stdout.splitlines() if line.startswith("tm    tiny"))
    assert int(row.split()[2]) > 0


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("slosched")]


PAGE = shell_lines((Path(__file__).parents[1] / "docs" / "share.md").read_text())


class _Reached(BaseException):
    """The command line was understood; the work would begin."""


@pytest.mark.parametrize("line", PAGE)
def test_every_command_of_the_page_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*args: object, **kwargs: object) -> None:
        raise _Reached

    for work in ("experiment.run_experiment", "sweep.run_sweep", "spec_file.spec_text"):
        monkeypatch.setattr(f"slosched.share.{work}", reached)
    monkeypatch.setattr("slosched.analysis.share_figures.draw_jct", reached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp_configs").mkdir()
    for file in CONFIGS.iterdir():
        (tmp_path / "exp_configs" / file.name).write_text(file.read_text())
        (tmp_path / file.name).write_text(file.read_text())
    Path("mine.toml").write_text(
        '[[jobs]]\nmodel = "gpt"\n[[jobs]]\nmodel = "bert"\nname = "search"\n'
        'clients = { arriving = "poisson", rate_per_s = 1.0 }\n'
    )
    with pytest.raises(_Reached):
        outcome = ran(*shlex.split(line.partition(" > ")[0])[2:])
        pytest.fail(f"{line!r} ended with {outcome.exit_code}: {outcome.output}")


def test_the_toml_of_the_page_is_an_experiment(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "share.md").read_text()
    named = []
    for block in re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        file = tmp_path / "page.toml"
        file.write_text(block)
        named.append([job.name for job in read_spec(file).jobs])
    assert ["diffusion", "search"] in named
    for name in {*ShareSpec.__struct_fields__, *Job.__struct_fields__} - {"jobs"}:
        assert f"`{name.removesuffix('_ns')}`" in text, name
