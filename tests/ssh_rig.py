"""A real OpenSSH server on loopback, with keys of its own, and the hosts.toml of three hosts that it serves.

The hosts are names of loopback addresses: `one` 127.0.0.1, `two` 127.0.0.2, `three` 127.0.0.3. Nothing outside
the test's folder is read or written, but for the empty folder /run/sshd, which the server demands.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from slosched.experiment.remote import children_of

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
ADDRESSES = {"one": "127.0.0.1", "two": "127.0.0.2", "three": "127.0.0.3"}
#: Where sshd separates its privileges; it does not start as root without.
_RUN_SSHD = Path("/run/sshd")


def missing() -> str:
    """Why there is no server to test against; "" if there is one."""
    if not Path(SSHD).exists():
        return "no sshd here: install Debian's openssh-server"
    if shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "no ssh here: install Debian's openssh-client"
    return ""


@dataclass
class Server:
    """A running sshd, and what a client needs to reach it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    there: Path  # where the hosts keep a run's files
    environment: dict[str, str] = field(default_factory=dict)

    def hosts_toml(
        self,
        *,
        workers: str = '["two", "three"]',
        defaults: str = "",
        own: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> Path:
        """A hosts.toml: `one` is the client, `two` the controller; `own` has further lines for a table."""
        lines = [
            'client = "one"',
            'controller = "two"',
            f"workers = {workers}",
            "[defaults]",
            'ssh_config = "ssh_config"',
            f'python = "{python}"',
            f'folder = "{self.there}"',
            'device = "emulated"',
            "worker_port = 0",
            "controller_port = 0",
            defaults,
            "[defaults.environment]",
            *(f'{key} = "{value}"' for key, value in self.environment.items()),
        ]
        for name, address in ADDRESSES.items():
            lines += [f"[hosts.{name}]", f'reach = "{address}"', f'bind = "{address}"']
            lines += [(own or {}).get(name, "")]
        path = self.folder / "hosts.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def sessions(self) -> list[int]:
        """The processes of the server that hold one connection each."""
        return children_of(self.process.pid)

    def left_there(self) -> list[Path]:
        """Folders of experiments that are still on the hosts."""
        return list(self.there.glob("slosched-experiment-*"))


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """Run sshd on a free port of the three addresses; it and its sessions are ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
    _write_files(folder, port)
    if os.geteuid() == 0:
        _RUN_SSHD.mkdir(mode=0o755, exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _await_port(process, port, folder / "sshd.log")
        made = Server(folder, port, process, folder / "there")
        # A checkout that is not installed is found as it is found here.
        if "PYTHONPATH" in os.environ:
            made.environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        yield made
    finally:
        for pid in (*children_of(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        process.wait(10)


def _write_files(folder: Path, port: int) -> None:
    listen = "\n".join(f"ListenAddress {address}" for address in ADDRESSES.values())
    (folder / "sshd_config").write_text(
        f"Port {port}\n{listen}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "PidFile none\nMaxStartups 100\nLogLevel VERBOSE\n"
    )
    key = (folder / "host_key.pub").read_text().strip()
    known = [f"[{address}]:{port} {key}" for address in ADDRESSES.values()]
    (folder / "known_hosts").write_text("\n".join(known) + "\n")
    lines = []
    for name, address in ADDRESSES.items():
        lines += [f"Host {name}", f"  HostName {address}"]
    lines += ["Host *", f"  Port {port}", f"  IdentityFile {folder}/user_key"]
    lines += ["  IdentitiesOnly yes", f"  UserKnownHostsFile {folder}/known_hosts"]
    lines += ["  GlobalKnownHostsFile /dev/null", "  StrictHostKeyChecking yes"]
    (folder / "ssh_config").write_text("\n".join(lines) + "\n")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(100):
        assert process.poll() is None, log.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.3", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"sshd does not listen: {log.read_text()}")
