"""Run directories: one run each, never overwritten."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from slosched.errors import InvalidConfig, RunDirectoryInUse
from slosched.output_files import check_not_stdout, write_error

MANIFEST = "manifest.json"
#: The name a client uses when it writes into the directory of a controller.
CLIENT_MANIFEST = "client_manifest.json"

_MOST_RUNS = 1000


def default_log_dir(kind: str = "run") -> Path:
    """Return $CLOCKWORK_LOG_DIR if that is set, else ./slosched-runs/<UTC time>-<kind>.

    Nothing is made on the disk.
    """
    from_environment = os.environ.get("CLOCKWORK_LOG_DIR", "")
    if from_environment:
        return Path(from_environment)
    # A human-readable date that names the directory; nothing is timed with it.
    return Path("slosched-runs") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{kind}"


def claim_run_dir(path: Path, *, exclusive: bool = False, manifest: str = MANIFEST) -> Path:
    """Make `path` this process's run directory and return it, or a numbered one inside it.

    A directory that is new or holds no run (no manifest, no *.tsv) is used as it is. One that holds
    a run is left alone: the result is then `path`/run-002, run-003, ... (`exclusive`: an error).
    With another `manifest` name (CLIENT_MANIFEST) a directory may be shared with a controller: only
    that file then says that it is taken. The claim is the exclusive making of the (empty) manifest,
    so that of two processes only one gets a directory.

    Raises RunDirectoryInUse, InvalidConfig if the directory cannot be made or written, OutOfResources on a
    full disk.
    """
    check_not_stdout(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not _holds_run(path, manifest) and _claim(path / manifest):
            return path
        if exclusive:
            raise RunDirectoryInUse(
                f"{path} already holds a run, and runs are never overwritten; choose another "
                "directory or move that one away"
            )
        return _numbered(path, manifest)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidConfig(
            f"{path} is not a directory; choose another place for the run"
        ) from error
    except OSError as error:
        raise write_error(
            f"cannot use {path} as a run directory: {error.strerror}; choose one you may write to",
            error,
        ) from error


def _numbered(path: Path, manifest: str) -> Path:
    for number in range(2, _MOST_RUNS):
        candidate = path / f"run-{number:03d}"
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        if _claim(candidate / manifest):
            return candidate
    raise RunDirectoryInUse(f"{path} already holds {_MOST_RUNS} runs; choose another directory")


def _holds_run(path: Path, manifest: str) -> bool:
    if (path / manifest).exists():
        return True
    return manifest == MANIFEST and any(path.glob("*.tsv"))


def _claim(manifest: Path) -> bool:
    try:
        os.close(os.open(manifest, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return False
    return True
