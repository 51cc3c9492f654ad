"""One worker process per GPU: a parent that starts n children on consecutive ports and ends them.

A process that starts GPU work at exact times can hold one busy Python thread, so n GPUs are n
processes. The parent only waits: it passes on what the children say, prints one line when all are
ready, and forwards the signal that ends them. A child that dies is reported; the others go on. One that was
ready and ended by itself in whatever way (a lost GPU, a crash, a bug) is started again after a pause: a new
process often works where the old one could not be mended.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import msgspec

from slosched.clock import now_ns
from slosched.config import WorkerConfig
from slosched.daemon.housekeeping import check_core
from slosched.errors import DeviceLost, InvalidConfig, SloschedError
from slosched.units import NS_PER_S, format_duration

#: Children drain for at most 2 s; what is left after this is killed.
_END_WITHIN_NS = 4 * NS_PER_S
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1
_READY = "slosched worker ready on "


@dataclass(frozen=True, slots=True)
class RestartRule:
    """When a child that ended by itself is started again: after a pause that doubles each time, and at
    most `at_most` times within `within_ns`.
    """

    first_pause_ns: int = NS_PER_S
    longest_pause_ns: int = 30 * NS_PER_S
    at_most: int = 5
    within_ns: int = 600 * NS_PER_S

    def pause_ns(self, restarts: list[int], now_ns: int) -> int | None:
        """How long to wait now, None: no more. `restarts` are the times of earlier ones, and gets this."""
        restarts[:] = [at_ns for at_ns in restarts if now_ns - at_ns < self.within_ns]
        if len(restarts) >= self.at_most:
            return None
        pause_ns = min(self.first_pause_ns << len(restarts), self.longest_pause_ns)
        restarts.append(now_ns)
        return pause_ns


@dataclass(slots=True)
class _Child:
    config: WorkerConfig
    process: subprocess.Popen[bytes]
    restarts: list[int] = field(default_factory=list)  # when it ended by itself lately
    restart_ns: int | None = None  # it has ended, and is started again then
    partial: bytes = b""
    ready: bool = False
    was_ready: bool = False  # in some life
    ended: bool = False

    @property
    def name(self) -> str:
        return f"worker {self.config.device} on port {self.config.port}"


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    folder = Path("/proc/driver/nvidia/gpus")
    if folder.is_dir():
        return len(list(folder.iterdir()))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, timeout=10, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def child_argv(config: WorkerConfig) -> list[str]:
    """The command of the child that serves `config`: this module, with the config as JSON."""
    text = msgspec.json.encode(config).decode()
    return [sys.executable, "-m", "slosched.daemon.supervisor", text]


def run_workers(
    config: WorkerConfig,
    argv_of_child: Callable[[WorkerConfig], Sequence[str]] = child_argv,
    *,
    announce: Callable[[str], None],
    gpus: int | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Serve `config` on this host's GPUs until SIGINT, SIGTERM or `stop`; returns the exit code.

    Device auto or cuda: a child per GPU, on `config.port`, +1, ... (port 0: any ports), and on the cores
    `config.cpu`, +1, ... if that is given. `gpus` says how many; None means `config.gpus` if that is above
    1, else all. With one GPU, or none, the worker runs in this process (auto then takes the CPU), and its
    DeviceLost ends it. Raises what run_worker raises, and InvalidConfig if there are fewer GPUs, or cores,
    than were asked for. Returns 1 if every child died by itself.
    """
    there = count_gpus() if config.device in ("auto", "cuda") else 0
    wanted = gpus if gpus is not None else (config.gpus if config.gpus > 1 else max(there, 1))
    if wanted > max(there, 1):
        raise InvalidConfig(
            f"{wanted} GPUs were asked for and {there} found; take fewer --gpus, or --device emulated"
        )
    if wanted == 1:
        from slosched.daemon.worker import run_worker

        return run_worker(replace(config, gpus=1), announce=announce, stop=stop)
    configs = [
        replace(
            config,
            gpus=1,
            device=f"cuda:{i}",
            port=config.port + i if config.port else 0,
            cpu=config.cpu + i if config.cpu >= 0 else -1,
        )
        for i in range(wanted)
    ]
    for each in configs:
        check_core(each.cpu)
    return supervise(configs, argv_of_child, announce=announce, stop=stop)


def supervise(
    configs: Sequence[WorkerConfig],
    argv_of_child: Callable[[WorkerConfig], Sequence[str]] = child_argv,
    *,
    announce: Callable[[str], None],
    stop: threading.Event | None = None,
    restarts: RestartRule | None = None,
) -> int:
    """Start a child for each config and wait; see run_workers. All have ended when it returns.

    A child that ends by itself is started again by the rule `restarts`, unless it never was ready: its
    options are wrong then, or its port is taken.
    """
    rule = restarts or RestartRule()
    stopping = stop or threading.Event()
    with _signals_set(stopping), selectors.DefaultSelector() as selector:
        children: list[_Child] = []
        announced = False
        try:
            for each in configs:
                child = _Child(each, _start(argv_of_child(each)))
                children.append(child)
                _listen(child, selector)
            while not stopping.is_set() and not all(child.ended for child in children):
                _pass_on(selector, announce)
                for child in children:
                    _look_after(child, children, rule, announce)
                    if child.restart_ns is not None and now_ns() >= child.restart_ns:
                        _stop_listening(child, selector)
                        child.process = _start(argv_of_child(child.config))
                        child.restart_ns, child.ready, child.partial = None, False, b""
                        _listen(child, selector)
                announced = announced or _say_when_ready(children, announce)
            died = all(child.ended for child in children)
        finally:
            _end(children, selector, announce)
    return 1 if died and not stopping.is_set() else 0


def _start(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise SloschedError(f"cannot start {argv[0]}: {error.strerror}") from None


def _listen(child: _Child, selector: selectors.BaseSelector) -> None:
    assert child.process.stdout is not None
    selector.register(child.process.stdout, selectors.EVENT_READ, child)


def _stop_listening(child: _Child, selector: selectors.BaseSelector) -> None:
    """Of a process that has ended."""
    output = child.process.stdout
    assert output is not None
    with suppress(KeyError):  # it is off already once it was read to its end
        selector.unregister(output)
    output.close()


def _look_after(
    child: _Child,
    children: Sequence[_Child],
    rule: RestartRule,
    announce: Callable[[str], None],
) -> None:
    """Say that the child has ended, if it has, and when it is started again, if it is."""
    code = child.process.poll()
    if code is None or child.ended or child.restart_ns is not None:
        return
    again = ""
    lost = code == DeviceLost.exit_code
    if lost or (code != 0 and child.was_ready):
        what = "lost its device" if lost else f"ended with {_how(code)}"
        now = now_ns()
        pause_ns = rule.pause_ns(child.restarts, now)
        most = f"{rule.at_most} times in {format_duration(rule.within_ns)}"
        if pause_ns is not None:
            child.restart_ns = now + pause_ns
            announce(
                f"{child.name} {what} and starts again in {format_duration(pause_ns)} "
                f"({len(child.restarts)} of at most {most})"
            )
            return
        again = f" (it {what}; it was started again {most})"
    child.ended = True
    left = sum(not other.ended for other in children)
    announce(f"{child.name} ended with {_how(code)}{again}; {left} of {len(children)} go on")


def _say_when_ready(children: Sequence[_Child], announce: Callable[[str], None]) -> bool:
    """True, and it was said, if every child that lives is ready."""
    alive = [child for child in children if not child.ended]
    if not alive or not all(child.ready for child in alive):
        return False
    ports = ", ".join(str(child.config.port) for child in alive)
    announce(f"slosched: {len(alive)} of {len(children)} workers ready on ports {ports}")
    return True


def _pass_on(selector: selectors.BaseSelector, announce: Callable[[str], None]) -> None:
    for key, _ in selector.select(_LOOK_S):
        child: _Child = key.data
        data = os.read(key.fd, 65536)
        if not data:
            selector.unregister(key.fileobj)
            continue
        *lines, child.partial = (child.partial + data).split(b"\n")
        for line in lines:
            _take_line(child, line.decode(errors="replace"), announce)


def _take_line(child: _Child, line: str, announce: Callable[[str], None]) -> None:
    if line.startswith(_READY):
        child.ready = child.was_ready = True
        port = line.removeprefix(_READY).partition(": ")[0].rpartition(":")[2]
        child.config = replace(child.config, port=int(port))
    announce(f"{child.config.device}: {line}")


def _end(
    children: Sequence[_Child], selector: selectors.BaseSelector, announce: Callable[[str], None]
) -> None:
    """End every child: SIGTERM, at most 4 s of draining, SIGKILL."""
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    give_up_ns = now_ns() + _END_WITHIN_NS
    while any(child.process.poll() is None for child in children) and now_ns() < give_up_ns:
        _pass_on(selector, announce)  # also keeps their pipes from filling up
        if not selector.get_map():
            break
    for child in children:
        try:
            child.process.wait(max(0.1, (give_up_ns - now_ns()) / NS_PER_S))
        except subprocess.TimeoutExpired:
            announce(f"{child.name} did not end in time and was killed")
            child.process.kill()
            child.process.wait(5)
        if child.process.stdout is not None:
            child.process.stdout.close()


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


@contextmanager
def _signals_set(event: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `event`; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        event.set()

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _child_main(argv: Sequence[str]) -> int:
    """What `child_argv` starts. Lines go to stdout, which is a pipe to the parent."""
    from slosched.daemon.worker import run_worker

    # Were the parent killed outright, nobody else would end us.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    config = msgspec.json.decode(argv[0], type=WorkerConfig)

    def say(line: str) -> None:
        os.write(1, f"{line}\n".encode())

    try:
        return run_worker(config, announce=say)
    except SloschedError as error:
        say(f"error: {error}")
        if isinstance(error, DeviceLost):
            os._exit(error.exit_code)  # taking a dead CUDA context down may never end
        return error.exit_code


if __name__ == "__main__":
    sys.exit(_child_main(sys.argv[1:]))
