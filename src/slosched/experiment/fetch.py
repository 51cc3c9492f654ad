"""Short orders to a far end that has ended its run: fetching a folder, and removing it."""

from __future__ import annotations

import os
import select
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO

from slosched import child_processes
from slosched.errors import MalformedMessage, PeerUnreachable, SloschedError
from slosched.experiment.hosts import Host
from slosched.experiment.remote import PACK, Order
from slosched.experiment.ssh import SSH_FAILED, failure, far_end, printed_end
from slosched.output_files import new_file

#: A connection that brings nothing for this long is given up.
_SILENCE_S = 60.0
#: More files than a run can leave.
_MOST_FILES = 20_000
#: What a shell's start-up files may print before the folder.
_MOST_BEFORE = 1 << 16
_CHUNK = 1 << 20
_END_WITHIN_S = 5.0


class _Timed:
    """Reads a pipe for tarfile. Raises PeerUnreachable if nothing comes for `_SILENCE_S`."""

    def __init__(self, host: Host, pipe: IO[bytes]) -> None:
        self._host, self._descriptor = host, pipe.fileno()
        self._kept = b""

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or fewer at the end."""
        wanted = size if size >= 0 else 1 << 62
        parts, length = [self._kept[:wanted]], min(len(self._kept), wanted)
        self._kept = self._kept[wanted:]
        while length < wanted:
            part = self._some(min(_CHUNK, wanted - length))
            if not part:
                break
            parts.append(part)
            length += len(part)
        return b"".join(parts)

    def find(self, mark: bytes) -> bool:
        """Read up to and with `mark`; False if it does not come."""
        seen = b""
        while mark not in seen and len(seen) < _MOST_BEFORE:
            part = self._some(4096)
            if not part:
                return False
            seen += part
        _, found, self._kept = seen.partition(mark)
        return bool(found)

    def _some(self, size: int) -> bytes:
        if not select.select([self._descriptor], [], [], _SILENCE_S)[0]:
            raise PeerUnreachable(
                f"host {self._host.name}: nothing came for {_SILENCE_S:.0f} s while its files were fetched"
            )
        return os.read(self._descriptor, size)


def fetch(host: Host, folder: str, into: Path) -> int:
    """Copy the files of a host's `folder` into `into`; return their number. One that is here is replaced.

    Raises PeerUnreachable, MalformedMessage if what comes is not a packed folder, OutOfResources on a full
    disk.
    """
    process = _start(host, Order(pack=folder))
    assert process.stdout is not None
    try:
        pipe = _Timed(host, process.stdout)
        if not pipe.find(PACK):
            raise _failed(host, process, "nothing was packed")
        with tarfile.open(fileobj=pipe, mode="r|gz") as tar:  # type: ignore[call-overload]
            count = _unpack(host, tar, into)
        process.wait(_END_WITHIN_S)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _failed(host, process, str(error) or type(error).__name__) from None
    except subprocess.TimeoutExpired:
        pass  # all files are here
    finally:
        _end(process)
    return count


def _unpack(host: Host, tar: tarfile.TarFile, into: Path) -> int:
    count = 0
    for member in tar:
        name = PurePosixPath(member.name)
        if not member.isfile() or name.is_absolute() or ".." in name.parts or not name.parts:
            raise MalformedMessage(
                f"host {host.name} sent {member.name[:200]!r}, which is not a run's file"
            )
        count += 1
        if count > _MOST_FILES:
            raise MalformedMessage(f"host {host.name} sent more than {_MOST_FILES:,} files")
        source = tar.extractfile(member)
        assert source is not None
        with new_file(into / name) as file:
            while chunk := source.read(_CHUNK):
                file.write(chunk)
    return count


def remove(host: Host, folder: str, *, within_s: float = 20.0) -> None:
    """Remove a folder of an experiment on a host. Raises PeerUnreachable if that fails."""
    process = _start(host, Order(remove=folder))
    try:
        code = process.wait(within_s)
    except subprocess.TimeoutExpired:
        raise PeerUnreachable(f"host {host.name}: no answer within {within_s:.0f} s") from None
    finally:
        _end(process)
    if code:
        raise PeerUnreachable(f"host {host.name}: {folder} could not be removed")


def _start(host: Host, order: Order) -> subprocess.Popen[bytes]:
    process = child_processes.start(
        far_end(host), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.write(order.line())
        process.stdin.flush()
    return process


def _failed(host: Host, process: subprocess.Popen[bytes], reason: str) -> SloschedError:
    """The error of a far end that sent no folder: what ssh or it printed."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_WITHIN_S)
    text = ""
    if process.stderr is not None and process.poll() is not None:
        text = process.stderr.read(1 << 16).decode(errors="replace")
    if process.returncode == SSH_FAILED:
        return failure(host, text, running=False)
    return PeerUnreachable(
        f"host {host.name}: its files did not come ({reason}): {printed_end(text)}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    child_processes.end(process, within_s=_END_WITHIN_S)
