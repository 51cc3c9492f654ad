"""A real Triton Inference Server on this host's CPU: fetched, given a model repository, started and ended.

The `tritonserver` binary 2.51.0 and its Python backend come from the wheel of nvidia-pytriton 0.7.0 (PyPI), of
which nothing else is used. It is unpacked into a cache folder, and downloaded there if it is missing.

    .venv/bin/python benchmarks/triton_server/triton_process.py --directory NEW_FOLDER    # fetch, start, end
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from venv import EnvBuilder

from slosched import child_processes
from slosched.clock import monotonic_ns
from slosched.errors import MissingPackage, SloschedError
from slosched.output_files import write_file
from slosched.units import NS_PER_S

#: The version of the server in the wheel.
VERSION = "2.51.0"
WHEEL = "nvidia-pytriton==0.7.0"
#: The stubs' own: with a numpy of 2.4 they take and give wrong tensors.
NUMPY = "numpy==1.26.4"
_ENVIRONMENT = "environment"
_WHEEL_FILES = "nvidia_pytriton-0.7.0-*.whl"
_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
_DOWNLOAD_S, _READY_S, _END_S = 600.0, 60.0, 10.0
_POLL_S = 0.05
#: A port that was free may be taken before the server has it.
_STARTS = 3
#: Becomes the server, which the kernel ends with this process.
_RUN = (
    "import os, sys; from slosched.child_processes import end_with_parent; "
    "end_with_parent(9); os.execv(sys.argv[1], sys.argv[1:])"
)
_STUB = b"triton_python_backend_stub"
DEFAULT_CACHE = Path("~/.cache/slosched/triton")


class TritonFailed(SloschedError):
    """Triton was not fetched, did not become ready, or ended when it should have served."""


@dataclass(frozen=True)
class Model:
    """A model of the Python backend: its config.pbtxt, and its model.py (a class TritonPythonModel)."""

    name: str
    config: str
    code: str
    versions: tuple[int, ...] = (1,)


# ------------------------------------------------------------------------------------ fetching


def fetched(cache: Path = DEFAULT_CACHE) -> Path:
    """The folder in `cache` with the unpacked wheel. Raises TritonFailed if it can be neither found nor had."""
    cache = cache.expanduser()
    unpacked = cache / "unpacked"
    if (unpacked / "complete").exists():
        return unpacked
    cache.mkdir(parents=True, exist_ok=True)
    wheel = _wheel(cache)
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    _make_environment(unpacked)
    _triton(unpacked, "bin", "tritonserver").chmod(0o755)
    write_file(unpacked / "complete", f"{WHEEL}\n".encode())
    return unpacked


def _make_environment(unpacked: Path) -> None:
    """The stubs embed this Python's library, and look for its packages beside the first python3 on PATH."""
    folder = unpacked / _ENVIRONMENT
    EnvBuilder(symlinks=True).create(folder)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    _pip(["install", "--target", packages, NUMPY])


def _wheel(cache: Path) -> Path:
    if not list(cache.glob(_WHEEL_FILES)):
        wanted = cache / "wanted.txt"
        write_file(wanted, f"{WHEEL} --hash=sha256:{_SHA256}\n".encode())
        _pip(["download", "--require-hashes", "--dest", str(cache), "--requirement", str(wanted)])
    wheel = next(iter(cache.glob(_WHEEL_FILES)))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise TritonFailed(
            f"{wheel} is not the published wheel: its SHA-256 is {digest}; remove it"
        )
    return wheel


def _pip(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    command += ["--no-deps", "--only-binary", ":all:", "--quiet"]
    try:
        subprocess.run(command, check=True, timeout=_DOWNLOAD_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise TritonFailed(
            f"{WHEEL} and {NUMPY} were not had from the package index: {error}"
        ) from None


def _triton(unpacked: Path, *parts: str) -> Path:
    return unpacked.joinpath("pytriton", "tritonserver", *parts)


def _backends(unpacked: Path) -> Path:
    """The folder of backends, with the stub for this Python beside the Python backend."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = _triton(unpacked, "python_backend_stubs", python, "triton_python_backend_stub")
    if not stub.exists():
        raise MissingPackage(f"the wheel has no Python backend for Python {python}")
    target = _triton(unpacked, "backends", "python", stub.name)
    if not target.exists() or target.read_bytes() != stub.read_bytes():
        shutil.copy(stub, target)
        target.chmod(0o755)
    return _triton(unpacked, "backends")


# ------------------------------------------------------------------------------------- running


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def write_repository(folder: Path, models: Sequence[Model]) -> None:
    """Write the models as Triton reads them: NAME/config.pbtxt, NAME/VERSION/model.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        write_file(folder / model.name / "config.pbtxt", model.config.encode())
        for version in model.versions:
            write_file(folder / model.name / str(version) / "model.py", model.code.encode())


@dataclass
class Triton:
    """A server that is ready. It serves on 127.0.0.1 alone."""

    process: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    log: Path
    shared_prefix: str  # of its stubs' memory, and on their command lines

    def stubs(self) -> list[int]:
        """The processes of the Python backend, one for each instance, also when the server has died."""
        found = []
        for each in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = each.read_bytes()
                if _STUB in words and self.shared_prefix.encode() in words:
                    found.append(int(each.parent.name))
        return found

    def check(self) -> None:
        """Raise TritonFailed if it has ended."""
        code = self.process.poll()
        if code is not None:
            raise TritonFailed(f"tritonserver ended with exit code {code}: {_last_words(self.log)}")


@contextlib.contextmanager
def serving(
    directory: Path,
    models: Sequence[Model],
    *,
    cache: Path = DEFAULT_CACHE,
    arguments: Sequence[str] = (),
) -> Iterator[Triton]:
    """A server of `models`, whose files are in `directory`; ended, with its stubs, at the end.

    `arguments` are tritonserver's own. Raises TritonFailed if it does not become ready.
    """
    unpacked = fetched(cache)
    write_repository(directory / "models", models)
    triton = _started(unpacked, directory, arguments)
    try:
        yield triton
    finally:
        _end(triton)


def _started(unpacked: Path, directory: Path, arguments: Sequence[str]) -> Triton:
    for attempt in range(_STARTS):
        triton = _start(unpacked, directory, arguments)
        try:
            if _became_ready(triton):
                return triton
        except BaseException:
            _end(triton)
            raise
        _end(triton)
        taken = "already in use" in triton.log.read_text(errors="replace")
        if not taken or attempt == _STARTS - 1:
            break
    raise TritonFailed(
        f"tritonserver did not become ready: {_last_words(triton.log)} ({triton.log})"
    )


def _start(unpacked: Path, directory: Path, arguments: Sequence[str]) -> Triton:
    http, grpc, log = free_port(), free_port(), directory / "tritonserver.log"
    prefix = f"slosched_triton_{secrets.token_hex(4)}_"
    command = [
        *(sys.executable, "-c", _RUN),
        str(_triton(unpacked, "bin", "tritonserver")),
        f"--model-repository={directory / 'models'}",
        f"--backend-directory={_backends(unpacked)}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--cache-directory={_triton(unpacked, 'caches')}",
        "--http-address=127.0.0.1",
        f"--http-port={http}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc}",
        "--allow-metrics=false",
        "--exit-timeout-secs=2",
        *arguments,
    ]
    with log.open("wb") as out:
        process = child_processes.start(
            command, stdout=out.fileno(), stderr=subprocess.STDOUT, env=_environment(unpacked)
        )
    return Triton(process, http, grpc, log, prefix)


def _environment(unpacked: Path) -> dict[str, str]:
    """Where the server finds its libraries, and its stubs this Python's."""
    libraries = [str(unpacked / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    return {
        "PATH": f"{unpacked / _ENVIRONMENT / 'bin'}:/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/"),
        "LD_LIBRARY_PATH": ":".join(libraries),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _became_ready(triton: Triton) -> bool:
    deadline_ns = monotonic_ns() + round(_READY_S * NS_PER_S)
    while triton.process.poll() is None and monotonic_ns() < deadline_ns:
        if _answers_ready(triton.http_port):
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            triton.process.wait(_POLL_S)
    return False


def _answers_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it wrote nothing"])[-1].strip()


def _end(triton: Triton) -> None:
    """End the server; what is left of its stubs and their shared memory goes too."""
    child_processes.end(triton.process, within_s=_END_S)
    for pid in triton.stubs():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for region in Path("/dev/shm").glob(f"{triton.shared_prefix}*"):
        region.unlink(missing_ok=True)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Fetch Triton, start it without models, end it.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder it is kept in")
    parser.add_argument(
        "--directory", type=Path, required=True, help="folder for this run, a new one"
    )
    options = parser.parse_args(given)
    try:
        options.directory.mkdir(parents=True)
        with serving(options.directory, [], cache=options.cache) as triton:
            print(f"tritonserver {VERSION} is ready on 127.0.0.1:{triton.http_port}")
    except SloschedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
