"""A Redis server on loopback for one host, started and ended by the process that wants it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from slosched.child_processes import end, start
from slosched.clock import now_ns, sleep_ns
from slosched.errors import AddressInUse, MissingPackage, SloschedError
from slosched.output_files import make_folder

#: Valkey speaks the same protocol.
_PROGRAMS = ("redis-server", "valkey-server")
NO_PROGRAM = (
    "redis-server is not installed: `apt install redis-server` (Debian and Ubuntu); "
    "without it --store embedded serves one host"
)
#: It may have much to read that it kept.
_READY_NS = 60_000_000_000
_END_S = 10.0
#: Becomes the server, which the kernel then ends with its parent, also after kill -9 of that.
_LAUNCH = """
import os, signal, sys
from slosched.child_processes import end_with_parent
end_with_parent(signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def installed_program() -> str:
    """The path of a server's program; empty without one."""
    return next(filter(None, map(shutil.which, _PROGRAMS)), "")


class Server:
    """`keep`: the folder of an append-only file, with which data outlives the server. Without it, memory alone.

    Raises MissingPackage without a server's program, and AddressInUse if the port is taken.
    """

    def __init__(self, port: int, *, keep: Path | None = None, program: str | None = None) -> None:
        found = program or installed_program()
        if not found:
            raise MissingPackage(NO_PROGRAM)
        if keep is not None:
            make_folder(keep)
        folder = str(keep.absolute()) if keep is not None else tempfile.gettempdir()
        self.port, self.address = port, f"redis://127.0.0.1:{port}"
        options = {
            "port": str(port),
            "bind": "127.0.0.1",
            "dir": folder,
            "save": "",
            # The server reads this file if it is there, so its name must be new.
            "dbfilename": f"slosched-{os.urandom(8).hex()}.rdb",
            "appendonly": "no" if keep is None else "yes",
            "appendfsync": "everysec",
        }
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.process = start(
            [sys.executable, "-c", _LAUNCH, str(os.getpid()), found, *given],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        from slosched.functions.state.redis_store import RedisStore

        store = RedisStore(self.address)
        until_ns = now_ns() + _READY_NS
        try:
            while True:
                if self.process.poll() is not None:
                    raise AddressInUse(
                        f"the Redis server on port {self.port} ended with code {self.process.returncode}; "
                        "if another process listens there, choose another --port; a server that was left ends "
                        f"with `slosched state down --port {self.port}`"
                    )
                if store.process_id() == self.process.pid:
                    store.mark()
                    return
                if now_ns() > until_ns:
                    raise SloschedError(f"the Redis server on port {self.port} did not answer")
                sleep_ns(10_000_000)
        finally:
            store.close()

    def close(self) -> None:
        """End the server. It writes what it keeps."""
        end(self.process, within_s=_END_S)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
