"""Before anything starts: is each host reached, has it Python and the same slosched, are its ports free?

All hosts are asked at once, each within a time of its own; every host that is not fit is reported, not only the
first.
"""

from __future__ import annotations

import inspect
import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from slosched import child_processes
from slosched.clock import now_ns
from slosched.errors import PeerUnreachable, SloschedError
from slosched.experiment import probe
from slosched.experiment.hosts import Host, Hosts
from slosched.experiment.ssh import SSH_FAILED, failure, printed_end, python_on
from slosched.units import NS_PER_S
from slosched.version import __version__

#: To connect, start Python and import slosched from a cold disk.
WITHIN_S = 45.0
#: What every host needs free in its folder: a little, since a run's logs are fetched when it ends.
_LEAST_FREE_BYTES = 256 * 2**20
_END_WITHIN_S = 3.0
_NOT_FOUND = (126, 127)


class Answer(msgspec.Struct, kw_only=True):
    """What the probe found on a host: texts are "" where all is well; `ports` by number."""

    python: str
    executable: str
    slosched: str
    missing: str
    folder: str
    free_bytes: int
    ports: dict[str, str]
    cores: int
    hostname: str


class NotFit(SloschedError):
    """A host that is reached cannot take its part in an experiment; the message says why and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Asked:
    """A host and the probe that runs there."""

    host: Host
    process: subprocess.Popen[bytes]


def check_hosts(hosts: Hosts, *, within_s: float = WITHIN_S) -> dict[str, Answer]:
    """What each host answered, by its name.

    Raises PeerUnreachable for a host that cannot be asked and NotFit for one that is not fit; if there are
    several, the error names each of them.
    """
    asked = [_ask(hosts, host) for host in hosts.all()]
    answers: dict[str, Answer] = {}
    problems: list[SloschedError] = []
    deadline_ns = now_ns() + int(within_s * NS_PER_S)
    try:
        for each in asked:
            left_s = max(0.1, (deadline_ns - now_ns()) / NS_PER_S)
            try:
                answer = _answer(each, left_s, within_s)
                _check(each.host, answer)
                answers[each.host.name] = answer
            except SloschedError as error:
                problems.append(error)
    finally:
        for each in asked:
            child_processes.end(each.process, within_s=_END_WITHIN_S)
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))
    return answers


def ports_of(hosts: Hosts, host: Host) -> list[tuple[str, int]]:
    """What the host's processes will listen on, as (bind, port), less ports that are chosen later."""
    ports = []
    if host.name == hosts.controller.name and host.controller_port:
        ports.append((host.bind, host.controller_port))
    if host.worker_port and any(worker.name == host.name for worker in hosts.workers):
        many = 1 if host.emulated else max(1, host.gpus)
        ports += [(host.bind, host.worker_port + place) for place in range(many)]
    return ports


def _ask(hosts: Hosts, host: Host) -> Asked:
    asked = {"folder": host.folder, "ports": ports_of(hosts, host)}
    process = child_processes.start(
        python_on(host, "-", json.dumps(asked)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    with suppress(OSError):  # that it has ended shows below
        process.stdin.write(inspect.getsource(probe).encode())
        process.stdin.close()
    process.stdin = None
    return Asked(host, process)


def _answer(asked: Asked, left_s: float, within_s: float) -> Answer:
    host, process = asked.host, asked.process
    try:
        out, errors = process.communicate(timeout=left_s)
    except subprocess.TimeoutExpired:
        raise PeerUnreachable(f"host {host.name}: no answer within {within_s:.0f} s") from None
    text = errors.decode(errors="replace")
    if process.returncode == SSH_FAILED:
        raise failure(host, text, running=False)
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(probe.MARK):
            with suppress(msgspec.MsgspecError, json.JSONDecodeError):
                return msgspec.convert(json.loads(line.removeprefix(probe.MARK)), Answer)
    if process.returncode in _NOT_FOUND:
        raise NotFit(
            f"host {host.name}: {host.python} does not run there ({printed_end(text)}); name the Python "
            "that has slosched by the key python"
        )
    raise NotFit(f"host {host.name}: {host.python} failed: {printed_end(text, 2)}")


def _check(host: Host, answer: Answer) -> None:
    """Raise NotFit unless the host can take its part."""
    problems = list(_problems(host, answer))
    if problems:
        raise NotFit(f"host {host.name}: {', and '.join(problems)}")


def _problems(host: Host, answer: Answer) -> Sequence[str]:
    problems = []
    if answer.missing:
        problems.append(
            f"slosched cannot be imported by {answer.executable} ({answer.missing}): install slosched "
            f"{__version__} there, or name the Python that has it by the key python"
        )
    elif answer.slosched != __version__:
        problems.append(
            f"it has slosched {answer.slosched} and this machine {__version__}; install the same there"
        )
    if answer.folder:
        problems.append(
            f"folder {host.folder} cannot be written ({answer.folder}); name another by the key folder"
        )
    elif answer.free_bytes < _LEAST_FREE_BYTES:
        problems.append(
            f"folder {host.folder} has only {answer.free_bytes // 2**20} MiB free; name another by the key "
            "folder"
        )
    problems += [
        f"port {port} on {host.bind} cannot be used ({why}); end what uses it, or give worker_port or "
        "controller_port another"
        for port, why in answer.ports.items()
        if why
    ]
    return problems
