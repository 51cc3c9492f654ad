"""What preflight runs on a host: this text on the standard input of its Python, which may lack slosched.

Its argument is JSON: the `folder` to write in, and the `ports` to listen on as [bind, port]. It prints one line
of JSON behind a mark, as a shell's start-up files may print too. Nothing of slosched is imported before it is
known to be there, and Python 3.7 understands all of it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
from pathlib import Path

MARK = "SLOSCHED PROBE "


def port_problem(bind: str, port: int) -> str:
    """Why nothing can listen there; "" if it can."""
    host = bind.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("" if host == "*" else host, port))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def folder_problem(folder: Path) -> str:
    """Why nothing can be written there; "" if it can. It is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return "" if os.access(folder, os.W_OK) else "not writable"


def version() -> tuple[str, str]:
    """(slosched's version, why it cannot be imported); one of them is ""."""
    try:
        import slosched.experiment.remote
        from slosched.version import __version__
    except Exception as error:  # whatever its import raises there
        return "", type(error).__name__ + ": " + str(error)
    assert slosched.experiment.remote
    return __version__, ""


def main() -> None:
    asked = json.loads(sys.argv[1])
    found, missing = version()
    folder = Path(asked["folder"]).expanduser()
    problem = folder_problem(folder)
    answer = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "slosched": found,
        "missing": missing,
        "folder": problem,
        "free_bytes": 0 if problem else shutil.disk_usage(str(folder)).free,
        "ports": {str(port): port_problem(bind, port) for bind, port in asked["ports"]},
        "cores": os.cpu_count() or 0,
        "hostname": socket.gethostname(),
    }
    print(MARK + json.dumps(answer), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
