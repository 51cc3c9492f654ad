"""`slosched worker` and `slosched controller` make the configuration that their words say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slosched.daemon.controller
import slosched.daemon.supervisor
import slosched.daemon.worker
from slosched.cli.app import app
from slosched.config import ControllerConfig, SchedulerConfig, WorkerConfig
from slosched.core.scheduler.policies import CASCADE_POLICIES, POLICIES, resolved, summaries

Run = Callable[..., ControllerConfig]


class Captured:
    """What a run_* function was called with; `code` is what it returns."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, WorkerConfig | ControllerConfig]] = []
        self.code = 0

    def taking(self, name: str) -> Callable[..., int]:
        def run(
            config: WorkerConfig | ControllerConfig, *, announce: object, **more: object
        ) -> int:
            self.calls.append((name, config))
            return self.code

        return run


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    result = Captured()
    monkeypatch.setattr(slosched.daemon.worker, "run_worker", result.taking("worker"))
    monkeypatch.setattr(slosched.daemon.supervisor, "run_workers", result.taking("workers"))
    monkeypatch.setattr(slosched.daemon.controller, "run_controller", result.taking("controller"))
    return result


def controller_config(captured: Captured, *args: str) -> ControllerConfig:
    result = CliRunner().invoke(app, ["controller", *args])
    assert result.exit_code == 0, result.output
    [(_, config)] = captured.calls
    captured.calls.clear()
    assert isinstance(config, ControllerConfig)
    return config


def failure(*args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


# --------------------------------------------------------------------------------- controller


def test_the_seeds_positional_form(captured: Captured) -> None:
    config = controller_config(
        captured, "INFER5", "cluster03:12345,cluster04:12345", "0", "6", "5000000"
    )
    assert config.workers == ("cluster03:12345", "cluster04:12345")
    scheduler = config.scheduler
    assert (scheduler.policy, scheduler.generate_inputs, scheduler.max_gpus) == ("INFER5", False, 6)
    assert scheduler.schedule_ahead_ns == 5_000_000
    assert scheduler.default_slo_ns == 100_000_000


def test_a_controller_needs_no_list_as_workers_may_register(captured: Captured) -> None:
    config = controller_config(captured, "INFER5", "--join-key", "cluster.key")
    assert (config.workers, config.join_key) == ((), "cluster.key")


def test_all_six_positional_options_in_the_seeds_order(captured: Captured) -> None:
    config = controller_config(
        captured, "INFER5", "a:1", "1", "2", "3ms", "40ms", "50000000", "4"
    ).scheduler
    assert (config.generate_inputs, config.max_gpus, config.max_batch) == (True, 2, 4)
    assert config.schedule_ahead_ns == 3_000_000
    assert (config.default_slo_ns, config.max_exec_ns) == (40_000_000, 50_000_000)


def test_smart_takes_the_seventh_option_of_the_published_one_and_says_it_is_not_used(
    captured: Captured,
) -> None:
    args = ["controller", "SMART", "a:1", "0", "6", "5000000", "40ms", "20ms", "8", "actions.csv"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.stderr
    assert captured.calls
    assert "action_telemetry_file 'actions.csv' is not used" in result.stderr
    assert "there are 7" in failure(*args, "one more")
    smart = resolved(SchedulerConfig(policy="SMART"))
    assert (smart.max_exec_ns, smart.max_batch) == (250_000_000, 16)


def test_what_is_accepted_is_said_by_options_or_in_the_file(
    captured: Captured, tmp_path: Path
) -> None:
    options = (
        "--max-slo",
        "1h",
        "--max-requests",
        "7",
        "--max-client-requests",
        "5",
        "--max-bytes",
        "2GiB",
        "--max-client-bytes",
        "1MiB",
        "--max-client-loads",
        "3",
    )
    by_option = controller_config(captured, "INFER5", "a:1", *options).scheduler
    assert (by_option.max_slo_ns, by_option.max_bytes) == (3600 * 10**9, 2 * 2**30)
    file = tmp_path / "controller.toml"
    file.write_text(
        '[scheduler]\nmax_slo = "1h"\nmax_requests = 7\nmax_client_requests = 5\nmax_bytes = "2GiB"\n'
        'max_client_bytes = "1MiB"\nmax_client_loads = 3\n'
    )
    assert (
        controller_config(captured, "INFER5", "a:1", "--config", str(file)).scheduler == by_option
    )
    assert "is above max_slo" in failure("controller", "INFER5", "a:1", "--max-slo", "50ms")
    assert "at least 1" in failure("controller", "INFER5", "a:1", "--max-requests", "0")


def test_the_options_form_says_the_same(captured: Captured) -> None:
    by_position = controller_config(
        captured, "INFER5", "a:1,b:1", "1", "6", "5000000", "40ms", "20ms", "8"
    )
    by_option = controller_config(
        captured,
        "INFER5",
        "--workers",
        "a:1",
        "--workers",
        "b:1",
        "--generate-inputs",
        "--max-gpus",
        "6",
        "--schedule-ahead",
        "5ms",
        "--default-slo",
        "40ms",
        "--max-exec",
        "20ms",
        "--max-batch",
        "8",
    )
    assert by_option == by_position


def test_options_may_stand_anywhere(captured: Captured) -> None:
    config = controller_config(
        captured,
        "--port",
        "0",
        "FIFO",
        "0",
        "--workers",
        "a:1-2",
        "6",
        "--bind",
        "127.0.0.1",
        "--http-port",
        "-1",
        "--log-dir",
        "logs",
    )
    assert config.workers == ("a:1", "a:2")
    assert (config.port, config.bind, config.http_port) == (0, "127.0.0.1", -1)
    assert (config.log_dir, config.scheduler.max_gpus) == ("logs", 6)


def test_defaults_are_the_documented_ones(captured: Captured) -> None:
    config = controller_config(captured, "INFER5", "--workers", "a:1")
    assert (config.port, config.bind) == (12346, "0.0.0.0")
    scheduler = resolved(config.scheduler)
    assert (scheduler.schedule_ahead_ns, scheduler.default_slo_ns) == (10_000_000, 100_000_000)
    assert (scheduler.max_exec_ns, scheduler.max_batch) == (25_000_000, 16)


def test_paper_fidelity_has_the_published_codes_defaults(captured: Captured) -> None:
    config = controller_config(captured, "INFER5", "--workers", "a:1", "--fidelity", "paper")
    scheduler = resolved(config.scheduler)
    assert (scheduler.max_exec_ns, scheduler.max_batch) == (250_000_000, 8)


def test_the_placement_rule_is_an_option(captured: Captured) -> None:
    config = controller_config(captured, "INFER5", "--workers", "a:1")
    assert config.scheduler.placement == "gain"
    config = controller_config(captured, "INFER5", "--workers", "a:1", "--placement", "demand")
    assert config.scheduler.placement == "demand"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["INFER9", "a:1"],
            "unknown scheduler TYPE 'INFER9' (did you mean INFER5?); known: "
            + ", ".join(sorted(POLICIES | CASCADE_POLICIES)),
        ),
        (["INFER5", "0", "6"], "'0' is not a host:port"),
        (["INFER5", "a:1", "0", "6", "5 parsecs"], "schedule_ahead"),
        (["INFER5", "a:1", "0", "-6"], "max_gpus must be at least 1, not -6"),
        (["INFER5", "a:1", "0", "6", "-5000000"], "schedule_ahead: '-5000000' is negative"),
        (["INFER5", "a:1", "0", "six"], "max_gpus must be a whole number, not 'six'"),
        (["INFER5", "a:1", "maybe"], "generate_inputs must be 0 or 1"),
        (["INFER5", "a:1", "0", "6", "5", "5", "5", "5", "7"], "there are 6"),
        (["INFER5", "a:1", "0", "6", "--max-gpus", "7"], "max_gpus is given twice"),
        (["INFER5", "a:1", "--fidelity", "worst"], "unknown fidelity 'worst'; known: best, paper"),
        (
            ["INFER5", "a:1", "--placement", "best"],
            "unknown placement 'best'; known: demand, gain, lru",
        ),
        (["INFER5", "a:1", "--default-slo", "nan"], "--default-slo"),
        (["INFER5", "a:1", "--port", "70000"], "port must be within 0..65535"),
        (["INFER5", "a:1", "--config", "no-such.toml"], "no-such.toml"),
    ],
)
def test_wrong_words_are_named_and_nothing_runs(
    captured: Captured, args: list[str], said: str
) -> None:
    assert said in failure("controller", *args)
    assert not captured.calls


def test_a_misspelt_option_is_no_positional_value(captured: Captured) -> None:
    result = CliRunner().invoke(app, ["controller", "INFER5", "a:1", "--max-gpu", "3"])
    assert result.exit_code == 2
    assert "--max-gpus" in result.stderr
    assert not captured.calls


def test_the_controllers_exit_code_is_ours(captured: Captured) -> None:
    captured.code = 9
    assert CliRunner().invoke(app, ["controller", "ECHO", "a:1"]).exit_code == 9


def test_options_win_over_the_file(captured: Captured, tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text('workers = ["a:1"]\nport = 7\n[scheduler]\nmax_gpus = 3\nmax_batch = 4\n')
    config = controller_config(captured, "INFER5", "--config", str(file), "--max-gpus", "5")
    assert (config.workers, config.port) == (("a:1",), 7)
    assert (config.scheduler.max_gpus, config.scheduler.max_batch) == (5, 4)
    config = controller_config(captured, "FIFO", "b:2", "--config", str(file), "--port", "8")
    assert (config.workers, config.port, config.scheduler.policy) == (("b:2",), 8, "FIFO")


def test_help_documents_every_type_and_the_units() -> None:
    text = CliRunner().invoke(app, ["controller", "--help"]).output
    assert [name for name, _ in summaries()] == [*POLICIES, *CASCADE_POLICIES]
    for name, summary in summaries():
        assert f"  {name:<17}{summary}\n" in text
    reference = Path(__file__).parents[1] / "docs" / "reference.md"
    described = reference.read_text(encoding="utf-8")
    assert all(f"`{name}`" in described for name in (*POLICIES, *CASCADE_POLICIES))
    for fact in ("10ms", "100ms", "25ms", "Default 16", "in ns", "12346"):
        assert fact in " ".join(text.split())


# ------------------------------------------------------------------------------------- worker


def test_real_gpus_have_a_process_each(captured: Captured) -> None:
    assert worker_config(captured)[0] == "workers"
    assert worker_config(captured, "--device", "cuda", "--gpus", "2")[0] == "workers"
    assert worker_config(captured, "--device", "cuda:1")[0] == "workers"


def worker_config(captured: Captured, *args: str) -> tuple[str, WorkerConfig]:
    result = CliRunner().invoke(app, ["worker", *args])
    assert result.exit_code == 0, result.output
    [(runner, config)] = captured.calls
    captured.calls.clear()
    assert isinstance(config, WorkerConfig)
    return runner, config


def test_an_emulated_worker_is_one_process(captured: Captured) -> None:
    runner, config = worker_config(
        captured,
        "--device",
        "emulated",
        "--gpus",
        "24",
        "--port",
        "0",
        "--bind",
        "127.0.0.1",
        "--weights-cache",
        "10GiB",
        "--profile",
        "fig7",
    )
    assert runner == "worker"
    assert (config.gpus, config.port, config.bind) == (24, 0, "127.0.0.1")
    assert (config.weights_cache_bytes, config.profile) == (10 * 2**30, "fig7")
    assert (config.cpu, config.gc) == (-1, "idle")
    _, config = worker_config(captured, "--device", "cpu", "--cpu", "2", "--gc", "auto")
    assert (config.cpu, config.gc) == (2, "auto")


def test_defaults_of_a_worker(captured: Captured) -> None:
    _, config = worker_config(captured, "--device", "cpu")
    assert config == WorkerConfig(device="cpu")
    assert (config.port, config.bind) == (12345, "0.0.0.0")


def test_a_workers_precision_and_libraries(captured: Captured, tmp_path: Path) -> None:
    words = ("--device", "cpu", "--dtype", "float16", "--channels-last", "--libraries", "timm")
    expected = WorkerConfig(device="cpu", dtype="float16", channels_last=True, libraries=("timm",))
    assert worker_config(captured, *words)[1] == expected
    file = tmp_path / "worker.toml"
    file.write_text('dtype = "float16"\nchannels_last = true\nlibraries = ["timm"]\n')
    named = ("--device", "cpu", "--config", str(file))
    assert worker_config(captured, *named)[1] == expected
    _, config = worker_config(captured, *named, "--no-channels-last", "--libraries", "")
    assert (config.dtype, config.channels_last, config.libraries) == ("float16", False, ())


def test_worker_options_win_over_the_file(captured: Captured, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('device = "emulated"\ngpus = 3\nport = 7\n')
    assert worker_config(captured, "--config", str(file))[1].gpus == 3
    _, config = worker_config(captured, "--config", str(file), "--gpus", "5")
    assert (config.device, config.gpus, config.port) == ("emulated", 5, 7)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--device", "tpu"],
            "unknown device 'tpu'; known: auto, cpu, cuda:N, emulated",
        ),
        (["--device", "cuda:x"], "unknown device"),
        (["--gpus", "0"], "gpus must be at least 1, not 0"),
        (["--port", "99999"], "port must be within 0..65535"),
        (["--gc", "never"], "unknown gc 'never'; known: auto, idle, off"),
        (["--cpu", "-7"], "cpu must be the number of a core"),
        (["--weights-cache", "lots"], "--weights-cache: 'lots' is not a size"),
        (["--config", "no-such.toml"], "no-such.toml"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: bfloat16, float16, float32"),
        (
            ["--libraries", "timm,keras"],
            "unknown library 'keras'; known: diffusion, originals, timm, torchvision",
        ),
    ],
)
def test_wrong_worker_options_are_named(captured: Captured, args: list[str], said: str) -> None:
    assert said in failure("worker", *args)
    assert not captured.calls
