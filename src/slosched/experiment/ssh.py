"""How the far end (remote.py) is started on a host: over the system's ssh, or as a process of this host.

ssh runs as the operator has it, with these exceptions. It asks nothing (BatchMode), forwards nothing (no agent,
no X11, no ports), shares no connection with other sessions, so that the end of this one is the end of what it
started, and notices within about 20 s that the other end is silent.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence

from slosched.errors import MissingPackage, PeerUnreachable, SloschedError
from slosched.experiment.hosts import Host

#: What ssh itself exits with; a far end never does.
SSH_FAILED = 255
#: Seconds until a connection must be there.
CONNECT_S = 10
_OPTIONS = (
    "BatchMode=yes",
    f"ConnectTimeout={CONNECT_S}",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "ControlMaster=no",
    "ControlPath=none",
    "RequestTTY=no",
    "RemoteCommand=none",
    "EscapeChar=none",
)
#: What ssh prints for a reason, and what to do about it.
_ADVICE = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key verification failed|key is known for",
        "its host key is unknown or has changed: connect once by hand (ssh {destination}), compare the "
        "key, and accept it or correct known_hosts",
    ),
    (
        r"Permission denied|Too many authentication failures",
        "it accepts none of your keys: name one by identity in hosts.toml, or check user; ssh {destination} "
        "must work without a password",
    ),
    (r"Could not resolve hostname", "its name is not known here: give its address in hosts.toml"),
    (
        r"Connection refused",
        "no ssh server answers there: check address and ssh_port in hosts.toml",
    ),
    (
        r"[Tt]imed out|No route to host|Network is unreachable",
        "it cannot be reached: check address and ssh_port in hosts.toml, and firewalls",
    ),
    (r"Bad configuration option|terminating, \d+ bad", "correct the ssh configuration"),
)
#: Lines of ssh that explain nothing.
_NOISE = re.compile(r"^(@|Warning: Permanently added|\*\* )|^$")


def check_ssh() -> None:
    """Raise MissingPackage unless this machine has ssh."""
    if shutil.which("ssh") is None:
        raise MissingPackage(
            "ssh is not installed on this machine; install OpenSSH's client (openssh-client), or take "
            "--engine local"
        )


def far_end(host: Host) -> list[str]:
    """The command of this machine that starts remote.py on `host`; its order follows on standard input."""
    if host.local:
        return [sys.executable, "-m", "slosched.experiment.remote"]
    return python_on(host, "-m", "slosched.experiment.remote")


def python_on(host: Host, *arguments: str) -> list[str]:
    """The command of this machine that runs the host's Python with `arguments`."""
    if host.local:
        return [sys.executable, *arguments]
    words = ["exec", "env"]
    words += [shlex.quote(f"{key}={value}") for key, value in (host.environment or {}).items()]
    words += [_home(host.python), *(shlex.quote(argument) for argument in arguments)]
    return [*_ssh(host), " ".join(words)]


def _ssh(host: Host) -> list[str]:
    command = ["ssh", "-T", "-a", "-x"]
    for option in _OPTIONS:
        command += ["-o", option]
    if host.ssh_config:
        command += ["-F", host.ssh_config]
    if host.ssh_port:
        command += ["-p", str(host.ssh_port)]
    if host.user:
        command += ["-l", host.user]
    if host.identity:
        command += ["-i", host.identity, "-o", "IdentitiesOnly=yes"]
    return [*command, "--", host.destination]


def _home(path: str) -> str:
    """A path for the other side's shell, which replaces a leading ~."""
    if path.startswith("~/"):
        return '"$HOME"/' + shlex.quote(path[2:])
    return shlex.quote(path)


def failure(host: Host, text: str, *, running: bool) -> SloschedError:
    """The error for an ssh to `host` that failed with exit code 255 and printed `text`.

    `running`: it had connected, so that the connection was lost.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if not _NOISE.search(line)]
    reason = lines[-1][:300] if lines else "ssh gave no reason"
    for pattern, advice in _ADVICE:
        if re.search(pattern, text) and not running:
            advice = advice.format(destination=host.destination)
            return PeerUnreachable(f"host {host.name}: {advice} (ssh: {reason})")
    if running:
        return PeerUnreachable(
            f"host {host.name}: the connection was lost ({reason}); what runs there ends by itself"
        )
    return PeerUnreachable(f"host {host.name}: ssh failed: {reason}")


def printed_end(text: str, lines: int = 1) -> str:
    """The last lines of what a process printed that say something, for an error."""
    found: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(found[-lines:])[:500] if found else "it printed nothing"
