"""`slosched doctor`: is this machine fit to keep deadlines? Each line says ok or warn, and what to do."""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say
from slosched.config import CONTROLLER_PORT, WORKER_PORT
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US, format_duration
from slosched.version import __version__

_NOFILE_ENOUGH = 4096
_CORES_ENOUGH = 4
_TIMER_LATE_NS = 500 * NS_PER_US  # p99 of how late a wake may come
_STALL_NS = 5 * NS_PER_MS  # the longest that the machine may take the CPU from us
_GAP_NS = NS_PER_MS
_NVIDIA_SMI_TIMEOUT_S = 10.0
#: Extras that single commands need, which name them when they are missing.
_FOR_SOME = {
    "gateway": ("httptools", "grpcio", "protobuf"),
    "digits": ("scikit-learn", "safetensors"),
    "diffusion": ("diffusers",),
    "state": ("redis",),
    "faasm": ("numba", "scikit-learn"),
    "dask": ("distributed",),
    "bound": ("scipy",),
}
_GOOD_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "timebase")


@dataclass(frozen=True)
class Check:
    """One line of the report. `advice` says what to do; it is empty where nothing need be done."""

    name: str
    ok: bool
    value: str
    advice: str = ""

    def line(self) -> str:
        text = f"{'ok' if self.ok else 'warn':<5} {self.name:<12} {self.value}"
        return f"{text}\n{'':<18} -> {self.advice}" if self.advice else text


def doctor(
    seconds: Annotated[
        float, typer.Option(min=0.1, max=60, help="How long to measure timer and stalls, in s.")
    ] = 1.0,
    json: Json = False,
) -> None:
    """Check limits, cores, timer, clock, GPUs, ports, packages and their extensions of this machine.

    Nothing is changed. Each line begins with ok or warn; a warning says what to do. The exit code is 0
    even with warnings: everything still runs, but with less exact timing. Measure on an idle machine.

    \b
    Examples:
      slosched doctor
      slosched doctor --seconds 10 --json
    """
    gpus = _find_gpus()
    checks = [
        Check(
            "version",
            True,
            f"slosched {__version__}, Python {platform.python_version()}, "
            f"{platform.system()} {platform.release()}",
        ),
        *_limits(bool(gpus.names)),
        _cores(),
        *_timer(seconds / 2),
        _stalls(seconds / 2),
        _clock(),
        _gpu_check(gpus),
        *(
            _port(port, whose)
            for port, whose in ((WORKER_PORT, "worker"), (CONTROLLER_PORT, "controller"))
        ),
        *_packages(bool(gpus.names)),
        *_extensions(),
    ]
    warnings = sum(not check.ok for check in checks)
    if json:
        print_json({"ok": warnings == 0, "checks": [asdict(check) for check in checks]})
        return
    for check in checks:
        say(check.line())
    say(f"{warnings} warning(s)" if warnings else "everything is as it should be")


# ------------------------------------------------------------------------------------- limits


def _limits(has_gpu: bool) -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Check(
        "open files",
        soft == resource.RLIM_INFINITY or soft >= _NOFILE_ENOUGH,
        f"NOFILE {_limit(soft)} (hard {_limit(hard)})",
        ""
        if soft == resource.RLIM_INFINITY or soft >= _NOFILE_ENOUGH
        else "a controller holds sockets for every peer: run `ulimit -n 65535` first",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = soft == resource.RLIM_INFINITY
    yield Check(
        "locked mem",
        locked or not has_gpu,
        f"MEMLOCK {_limit(soft)}{'' if locked else ' bytes'}",
        ""
        if locked or not has_gpu
        else "pinned host memory may be refused: run `ulimit -l unlimited`, or set memlock in "
        "/etc/security/limits.conf",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_RTPRIO)
    realtime = soft == resource.RLIM_INFINITY or soft > 0
    yield Check(
        "real time",
        realtime or not has_gpu,
        f"RTPRIO {_limit(soft)}{'' if realtime else ' (needed on shared machines only)'}",
        ""
        if realtime or not has_gpu
        else "on a machine that others use too, set rtprio in /etc/security/limits.conf and start "
        "workers under `chrt -r 1`",
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _cores() -> Check:
    try:
        usable = float(len(os.sched_getaffinity(0)))
    except AttributeError:
        usable = float(os.cpu_count() or 1)
    quota = _cgroup_cores()
    limited = quota is not None and quota < usable
    if quota is not None and limited:
        usable = quota
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    value = f"{usable:g} usable{' (by the container)' if limited else ''}, of {os.cpu_count()}"
    if governor:
        value += f"; governor {governor}"
    advice = []
    if usable < _CORES_ENOUGH:
        advice.append(
            "worker, controller and client want a core each; on fewer, figures at high rates are of "
            "this machine and not of the scheduler (take --no-inputs and lower rates)"
        )
    if governor == "powersave":
        advice.append("set the governor to performance: `cpupower frequency-set -g performance`")
    return Check("cores", not advice, value, "; ".join(advice))


def _cgroup_cores() -> float | None:
    """The container's CPU quota in cores, or None where there is none (cgroup v2)."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return (
        int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# --------------------------------------------------------------------------- timer and stalls


def _timer(seconds: float) -> Iterator[Check]:
    """How late the kernel wakes us, with the timer that the daemons use."""
    from slosched import clock

    clock.set_timer_slack()
    try:
        waiter = clock.Waiter()
    except (OSError, AttributeError) as error:
        yield Check("timer", False, f"no timerfd ({error})", "the daemons need Linux")
        return
    late: list[int] = []
    try:
        end_ns = clock.now_ns() + int(seconds * NS_PER_S)
        while (due_ns := clock.now_ns() + NS_PER_MS) < end_ns:
            while (now := clock.now_ns()) < due_ns:
                waiter.wait(due_ns, at_most_ns=NS_PER_S)
            late.append(now - due_ns)
    finally:
        waiter.close()
    late.sort()
    p50, p99 = late[len(late) // 2], late[len(late) * 99 // 100]
    fine = p99 <= _TIMER_LATE_NS
    yield Check(
        "timer",
        fine,
        f"wakes {format_duration(p50)} late (p99 {format_duration(p99)}, most "
        f"{format_duration(late[-1])}; {len(late)} times)",
        ""
        if fine
        else "the machine is busy, or its timers are coarse: end other work, or take a machine of "
        "your own; deadlines below 10 ms will suffer",
    )


def _stalls(seconds: float) -> Check:
    """The longest gap in a loop that does nothing but read the clock: another process had the CPU."""
    from slosched.clock import now_ns

    last = start = now_ns()
    end = start + int(seconds * NS_PER_S)
    longest = gaps = lost = 0
    while last < end:
        now = now_ns()
        gap = now - last
        last = now
        if gap > _GAP_NS:
            gaps += 1
            lost += gap
        if gap > longest:
            longest = gap
    fine = longest <= _STALL_NS
    return Check(
        "stalls",
        fine,
        f"longest {format_duration(longest)}; {gaps} above 1ms, {100 * lost / (last - start):.2f} % of "
        f"{format_duration(last - start)}",
        ""
        if fine
        else "a process that spins was stopped for that long: other work, a CPU quota or the "
        "hypervisor took the core; runs on this machine will miss short deadlines",
    )


def _clock() -> Check:
    from slosched.clock import now_ns

    source = _read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    reads = 2000
    start = now_ns()
    for _ in range(reads):
        now_ns()
    cost_ns = (now_ns() - start) // reads
    good = not source or any(source.startswith(name) for name in _GOOD_CLOCKS)
    return Check(
        "clock",
        good and cost_ns < 2 * NS_PER_US,
        f"source {source or 'unknown'}, {format_duration(cost_ns)} for a reading",
        ""
        if good and cost_ns < 2 * NS_PER_US
        else "readings go through the kernel; boot with clocksource=tsc if the CPU's is stable",
    )


# --------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class _Gpus:
    names: tuple[str, ...]
    driver: str = ""
    problem: str = ""
    not_persistent: int = 0


_QUERY = ("name", "memory.total", "driver_version", "persistence_mode")


def _find_gpus() -> _Gpus:
    if shutil.which("nvidia-smi") is None:
        return _Gpus((), problem="no nvidia-smi")
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _Gpus((), problem=f"nvidia-smi does not answer ({type(error).__name__})")
    if done.returncode != 0:
        return _Gpus((), problem=(done.stdout or done.stderr).strip().splitlines()[0][:100])
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]
    rows = [row for row in rows if len(row) == len(_QUERY)]
    return _Gpus(
        tuple(f"{row[0]} ({row[1]})" for row in rows),
        driver=rows[0][2] if rows else "",
        not_persistent=sum(row[3] == "Disabled" for row in rows),
    )


def _gpu_check(gpus: _Gpus) -> Check:
    if not gpus.names:
        fine = gpus.problem in ("", "no nvidia-smi")
        return Check(
            "GPU",
            fine,
            f"none{f' ({gpus.problem})' if gpus.problem else ''}; emulated GPUs and the CPU work",
            "" if fine else "look at `nvidia-smi`: the driver is installed but does not work",
        )
    return Check(
        "GPU",
        not gpus.not_persistent,
        f"{len(gpus.names)}: {', '.join(dict.fromkeys(gpus.names))}; driver {gpus.driver}",
        "the first use after a pause takes seconds: `sudo nvidia-smi -pm 1`"
        if gpus.not_persistent
        else "",
    )


# ------------------------------------------------------------------------- ports and packages


def _port(port: int, whose: str) -> Check:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
            probe.listen(1)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return Check(
                f"port {port}",
                False,
                "in use" if taken else f"cannot be used ({error.strerror})",
                f"end the process that has it (a {whose} that runs?), or take another --port",
            )
    return Check(f"port {port}", True, f"free for a {whose}")


def _packages(has_gpu: bool) -> Iterator[Check]:
    base = ("uvloop", "pyzmq", "msgspec", "msgpack", "typer", "rich", "numpy", "pillow", "h11")
    yield _package_check("base", base, "pip install slosched", wanted=True)
    yield _torch_check(has_gpu)
    yield _package_check("models", ("transformers",), "pip install slosched[models]", wanted=True)
    yield _package_check(
        "gpu", ("cupy-cuda13x", "nvidia-ml-py"), "pip install slosched[gpu]", wanted=has_gpu
    )
    yield _package_check("plot", ("matplotlib",), "pip install slosched[plot]", wanted=True)
    for extra, packages in _FOR_SOME.items():
        yield _package_check(extra, packages, f"pip install slosched[{extra}]", wanted=False)


def _extensions() -> Iterator[Check]:
    """What other packages add; each is imported."""
    from slosched.core.scheduler.policies import POLICY_TYPES
    from slosched.daemon.backends.opening import DEVICES
    from slosched.workloads import WORKLOAD_KINDS

    for registry in (POLICY_TYPES, WORKLOAD_KINDS, DEVICES):
        for each in registry.outside():
            value = f"{registry.kind} {each.name} from {each.origin.text}"
            advice = f"mend or uninstall {each.origin.package}" if each.problem else ""
            problem = f" cannot be used: {each.problem}" if each.problem else ""
            yield Check("extension", not each.problem, value + problem, advice)


def _package_check(name: str, packages: tuple[str, ...], install: str, *, wanted: bool) -> Check:
    found = {package: _version(package) for package in packages}
    missing = [package for package, there in found.items() if not there]
    value = ", ".join(f"{package} {there or 'missing'}" for package, there in found.items())
    ok = not missing or not wanted
    return Check(f"[{name}]" if name != "base" else "packages", ok, value, "" if ok else install)


def _torch_check(has_gpu: bool) -> Check:
    there = _version("torch")
    if not there:
        return Check(
            "[torch]",
            False,
            "missing: no real inference, emulated GPUs work",
            "pip install slosched[torch]",
        )
    if has_gpu and there.endswith("+cpu"):
        return Check(
            "[torch]",
            False,
            f"torch {there}, which sees no GPU",
            "install torch's CUDA build to use the GPU",
        )
    return Check("[torch]", True, f"torch {there}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
