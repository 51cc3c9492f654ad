"""`slosched profile`: what it measures, what it writes when, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import slosched.daemon.profiler
from slosched.cli.app import app
from slosched.cli.values import whole_numbers
from slosched.config import GpuProfile, ModelProfile, WorkerConfig
from slosched.config_file import load_profile, write_profile
from slosched.errors import InvalidConfig, OutOfResources, OutputExists, UnknownName

ZOO = ("resnet18", "resnet50", "gpt2")


@dataclass
class Job:
    """What stands in for the measuring, and what it was asked for."""

    configs: list[WorkerConfig] = field(default_factory=list)
    measured: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    failing: dict[str, BaseException] = field(default_factory=dict)
    seen: list[set[str]] = field(default_factory=list)  # models in the file, before each model
    out: Path | None = None


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    job = Job()

    class Profiler:
        names = (*ZOO, "mine")

        def __init__(self, config: WorkerConfig, extra: Sequence[str]) -> None:
            job.configs.append(config)

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def canonical(self, name: str) -> str:
            if name not in (*self.names, "timm/a"):
                raise UnknownName("model", name, list(self.names))
            return name

        def measure(self, name: str, batches: Sequence[int], *, progress: Any) -> ModelProfile:
            job.measured.append((name, tuple(batches)))
            if job.out is not None:
                job.seen.append(set(load_profile(job.out).models) if job.out.exists() else set())
            if name in job.failing:
                raise job.failing[name]
            progress(f"{name} batch 1: 1.000 ms")
            return ModelProfile(name, {b: 1_000_000 * b for b in batches}, 2_000_000, 3_000_000)

    monkeypatch.setattr(slosched.daemon.profiler, "Profiler", Profiler)
    return job


def profile(*args: str) -> Result:
    return CliRunner().invoke(app, ["profile", "--device", "cpu", *args])


def test_a_profile_is_written_as_a_worker_reads_it(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    args = ("resnet50", "resnet18", "--batches", "4,2", "--out", str(out))
    result = profile(*args, "--weights-cache", "8GiB")
    assert result.exit_code == 0, result.output
    assert job.measured == [("resnet50", (1, 2, 4)), ("resnet18", (1, 2, 4))]
    written = load_profile(out)
    assert (written.name, written.weights_cache_bytes) == ("mine", 8 * 2**30)
    assert written.model("resnet18").exec_ns == {1: 1_000_000, 2: 2_000_000, 4: 4_000_000}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
    again = profile(*args)
    assert again.exit_code == 7
    assert "exists and is not overwritten" in again.stderr and "--resume" in again.stderr


def test_a_profile_as_json_and_its_progress_beside_it(job: Job) -> None:
    result = profile("resnet50", "--batches", "1,2", "--json")
    document = json.loads(result.stdout)
    assert document["models"]["resnet50"]["exec_ns"] == {"1": 1_000_000, "2": 2_000_000}
    assert "resnet50 (1 of 1)" in result.stderr and "resnet50 batch 1" in result.stderr


def test_all_is_the_zoo_and_the_configs_models_beside_those_named(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('dtype = "bfloat16"\nlibraries = ["timm"]\n')
    result = profile("timm/a", "gpt2", "--all", "--batches", "1-3,8", "--config", str(file))
    assert result.exit_code == 0, result.output
    assert job.measured == [(name, (1, 2, 3, 8)) for name in (*ZOO, "mine", "timm/a")]
    assert (job.configs[0].dtype, job.configs[0].libraries) == ("bfloat16", ("timm",))
    profile(
        "gpt2",
        "--config",
        str(file),
        "--dtype",
        "float16",
        "--channels-last",
        "--libraries",
        "torchvision, timm",
    )
    assert job.configs[1] == WorkerConfig(
        device="cpu", dtype="float16", channels_last=True, libraries=("torchvision", "timm")
    )


def test_one_failure_is_reported_and_the_others_go_on(job: Job, tmp_path: Path) -> None:
    job.failing = {"resnet50": RuntimeError("CUDA out of memory"), "mine": InvalidConfig("no file")}
    out = tmp_path / "gpu.toml"
    result = profile("--all", "--out", str(out))
    assert result.exit_code == 1
    assert set(load_profile(out).models) == {"resnet18", "gpt2"}
    assert "resnet50 failed: RuntimeError('CUDA out of memory')" in result.stderr
    assert "mine failed: no file" in result.stderr and "2 failed: resnet50, mine" in result.stderr
    assert "gpt2" in result.stdout
    alone = profile("mine", "--out", str(tmp_path / "none.toml"))
    assert alone.exit_code == 1 and alone.stdout == ""
    assert not (tmp_path / "none.toml").exists()


def test_a_stopped_job_goes_on_where_it_was(job: Job, tmp_path: Path) -> None:
    out = job.out = tmp_path / "gpu.toml"
    job.failing = {"gpt2": KeyboardInterrupt()}
    words = ("--all", "--out", str(out), "--weights-cache", "1GiB", "--name", "card", "--resume")
    stopped = profile(*words)
    assert stopped.exit_code != 0
    assert job.seen == [set(), {"resnet18"}, {"resnet18", "resnet50"}]
    job.failing, job.measured = {}, []
    result = profile("--all", "--out", str(out), "--resume")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in job.measured] == ["gpt2", "mine"]
    assert "2 of 4 measured before: resnet18, resnet50" in result.stderr
    whole = load_profile(out)
    assert (whole.name, whole.weights_cache_bytes) == ("card", 2**30)
    assert set(whole.models) == {*ZOO, "mine"}
    assert all(name in result.stdout for name in whole.models)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.toml"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "or give --all"),
        (("--all", "--resume"), "--resume needs --out"),
        (("resnet18", "nope"), "unknown model 'nope'"),
        (("gpt2", "--batches", "4-1"), "--batches must be"),
        (
            ("gpt2", "--dtype", "float8"),
            "unknown dtype 'float8' (did you mean float32?); known: bfloat16, float16, float32",
        ),
        (("gpt2", "--libraries", "keras"), "unknown library 'keras'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    job: Job, args: tuple[str, ...], said: str
) -> None:
    result = profile(*args)
    assert result.exit_code == 2 and said in result.stderr
    assert job.measured == []


def test_a_file_that_is_no_profile_is_not_gone_on_with(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "notes.toml"
    out.write_text("title = 'mine'\n")
    result = profile("gpt2", "--out", str(out), "--resume")
    assert result.exit_code == 2 and "unknown key 'title'" in result.stderr
    assert out.read_text() == "title = 'mine'\n"


def test_a_profile_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gpu(name: str) -> GpuProfile:
        return GpuProfile(name, {"m": ModelProfile("m", {1: 1}, 1, 1)}, 2**30)

    out = tmp_path / "x.toml"
    write_profile(out, gpu("first"), replacing=False)
    with pytest.raises(OutputExists, match="not overwritten"):
        write_profile(out, gpu("second"), replacing=False)
    write_profile(out, gpu("third"), replacing=True)
    assert load_profile(out).name == "third"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for path in (out, tmp_path / "new.toml"):
        with pytest.raises(OutOfResources, match="No space left"):
            write_profile(path, gpu("fourth"), replacing=path.exists())
    assert load_profile(out).name == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


def test_numbers_and_ranges() -> None:
    assert whole_numbers("--batches", "4, 1-3,2") == (1, 2, 3, 4)
    assert whole_numbers("--batches", "7") == (7,)
    for text in ("", "0", "a", "1,,2", "3-", "-3", "1-2-3", "2-1", "1.5"):
        with pytest.raises(InvalidConfig, match=r"--batches must be whole numbers from 1 up"):
            whole_numbers("--batches", text)
    with pytest.raises(InvalidConfig, match="names more than 1024"):
        whole_numbers("--batches", "1-99999")
