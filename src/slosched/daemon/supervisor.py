"""One worker process per GPU: a parent that starts n children on consecutive ports and ends them.

A process that starts GPU work at exact times can hold one busy Python thread, so n GPUs are n
processes. The parent only waits: it passes on what the children say, prints one line when all are
ready, and forwards the signal that ends them. A child that dies is reported; the others go on.
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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import msgspec

from slosched.clock import now_ns
from slosched.config import WorkerConfig
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import NS_PER_S

#: Children drain for at most 2 s; what is left after this is killed.
_END_WITHIN_NS = 4 * NS_PER_S
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1
_READY = "slosched worker ready on "


@dataclass(slots=True)
class _Child:
    config: WorkerConfig
    process: subprocess.Popen[bytes]
    partial: bytes = b""
    ready: bool = False
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

    Device auto or cuda: a child per GPU, on `config.port`, +1, ... (port 0: any ports). `gpus` says how
    many; None means `config.gpus` if that is above 1, else all. With one GPU, or none, the worker runs
    in this process (auto then takes the CPU). Raises what run_worker raises, and InvalidConfig if there
    are fewer GPUs than were asked for. Returns 1 if every child died by itself.
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
        replace(config, gpus=1, device=f"cuda:{i}", port=config.port + i if config.port else 0)
        for i in range(wanted)
    ]
    return supervise(configs, argv_of_child, announce=announce, stop=stop)


def supervise(
    configs: Sequence[WorkerConfig],
    argv_of_child: Callable[[WorkerConfig], Sequence[str]] = child_argv,
    *,
    announce: Callable[[str], None],
    stop: threading.Event | None = None,
) -> int:
    """Start a child for each config and wait; see run_workers. All have ended when it returns."""
    stopping = stop or threading.Event()
    with _signals_set(stopping), selectors.DefaultSelector() as selector:
        children: list[_Child] = []
        try:
            for each in configs:
                child = _Child(each, _start(argv_of_child(each)))
                children.append(child)
                assert child.process.stdout is not None
                selector.register(child.process.stdout, selectors.EVENT_READ, child)
            _watch(children, selector, stopping, announce)
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


def _watch(
    children: Sequence[_Child],
    selector: selectors.BaseSelector,
    stopping: threading.Event,
    announce: Callable[[str], None],
) -> None:
    """Pass on lines and report deaths until told to stop, or until nobody lives."""
    announced = False
    while not stopping.is_set() and not all(child.ended for child in children):
        _pass_on(selector, announce)
        for child in children:
            code = child.process.poll()
            if code is not None and not child.ended:
                child.ended = True
                left = sum(not other.ended for other in children)
                announce(f"{child.name} ended with {_how(code)}; {left} of {len(children)} go on")
        alive = [child for child in children if not child.ended]
        if not announced and alive and all(child.ready for child in alive):
            announced = True
            ports = ", ".join(str(child.config.port) for child in alive)
            announce(f"slosched: {len(alive)} of {len(children)} workers ready on ports {ports}")


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
        child.ready = True
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
        return error.exit_code


if __name__ == "__main__":
    sys.exit(_child_main(sys.argv[1:]))
