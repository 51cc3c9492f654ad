"""What preflight runs on a host: this text on the standard input of its Python, which may lack slosched.

`ASKED`, a dict, is set before it. It prints one line of JSON behind a mark: a shell's start-up files may print
too. Nothing of slosched is imported before it is known to be there, and nothing newer than Python 3.6 is used.
"""

import json
import os
import platform
import shutil
import socket
import sys
from pathlib import Path

MARK = "SLOSCHED PROBE "
ASKED = globals().get("ASKED", {"folder": "", "ports": []})


def port_problem(bind, port):  # type: ignore[no-untyped-def]
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


def folder_problem(folder):  # type: ignore[no-untyped-def]
    """Why nothing can be written there; "" if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return "" if os.access(folder, os.W_OK) else "not writable"


def version():  # type: ignore[no-untyped-def]
    """(slosched's version, why it cannot be imported); one of them is ""."""
    try:
        import slosched.experiment.remote
        from slosched.version import __version__
    except Exception as error:  # whatever its import raises there
        return "", type(error).__name__ + ": " + str(error)
    assert slosched.experiment.remote
    return __version__, ""


def main():  # type: ignore[no-untyped-def]
    found, missing = version()
    folder = Path(ASKED["folder"]).expanduser()
    problem = folder_problem(folder)
    answer = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "slosched": found,
        "missing": missing,
        "folder": problem,
        "free_bytes": 0 if problem else shutil.disk_usage(folder).free,
        "ports": {str(port): port_problem(bind, port) for bind, port in ASKED["ports"]},
        "cores": os.cpu_count() or 0,
        "hostname": socket.gethostname(),
    }
    print(MARK + json.dumps(answer), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
