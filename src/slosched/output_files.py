"""Files that commands write: whole or not at all, and never in place of something that is not a file.

A file is written beside its name and renamed when it is complete, so a reader, a full disk or Ctrl-C never
finds half of one. A rename replaces whatever has the name, also a device or a pipe; so only a regular file
may be there. A symbolic link is followed, and the file that it names is replaced.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from slosched.errors import InvalidConfig, OutOfResources, OutputExists, SloschedError

#: What the system says when it has no room left, whatever the file is called.
_NO_ROOM = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
)

#: What os.link says on a file system without links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def write_file(
    path: Path,
    data: bytes,
    *,
    replacing: bool = True,
    durable: bool = False,
    folders: bool = True,
) -> None:
    """Make `data` the content of the file `path`. See `new_file`."""
    with new_file(path, replacing=replacing, durable=durable, folders=folders) as file:
        file.write(data)


@contextmanager
def new_file(
    path: Path, *, replacing: bool = True, durable: bool = False, folders: bool = True
) -> Iterator[BinaryIO]:
    """Open a draft of the file `path`, which gets that name when the block ends without an error.

    With `folders`, those that are missing are made. Without `replacing` nothing may have the name. `durable`
    waits until the bytes are on the disk. Raises InvalidConfig if the file cannot be written, or something
    other than a regular file has its name, OutputExists if it may not be replaced and OutOfResources if the
    disk is full; an OSError within the block counts as one of the file.
    """
    target = check_output(path, replacing=replacing)
    draft: Path | None = None
    try:
        if folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        draft, descriptor = _draft(target)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        check_output(path, replacing=replacing)  # it may have come meanwhile
        _give_name(draft, target, replacing)
    except FileExistsError:
        raise _there_already(path) from None
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise write_error(f"cannot write {path}: {reason}", error) from error
    finally:
        if draft is not None:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def check_output(path: Path, *, replacing: bool = True) -> Path:
    """Return where a file `path` would be written, links followed. Call it before long work.

    Raises InvalidConfig if `path` is "-" or something other than a regular file has the name, and
    OutputExists without `replacing` if a regular file has it.
    """
    check_not_stdout(path)
    try:
        target = Path(os.path.realpath(path))
        mode = os.stat(target).st_mode  # noqa: PTH116 - without following a name that changed meanwhile
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidConfig(f"cannot write {path}: {reason}") from None
    if not stat.S_ISREG(mode):
        raise InvalidConfig(
            f"cannot write {path}: it is {_kind(mode)}, and only a regular file is replaced; name another file"
        )
    if not replacing:
        raise _there_already(path)
    return target


def _there_already(path: Path) -> OutputExists:
    return OutputExists(f"{path} exists and is not overwritten; choose another name")


def write_error(text: str, error: OSError) -> SloschedError:
    """Return the error to raise for an output that failed with `error`: OutOfResources for want of room on
    the machine, which no other name helps, else InvalidConfig."""
    kind = OutOfResources if error.errno in _NO_ROOM else InvalidConfig
    return kind(text)


def check_not_stdout(path: Path) -> None:
    """Raise InvalidConfig for "-": no output goes to stdout, and no file or folder shall be called so."""
    if str(path) == "-":
        raise InvalidConfig(
            "'-' is not taken as an output: files do not go to stdout; give a name (./- for one called so)"
        )


def check_folder(path: Path) -> None:
    """Raise InvalidConfig if `path` is "-", is there and no directory, or cannot be written into or made.

    Call it before long work.
    """
    check_not_stdout(path)
    for there in (path, *path.parents):
        try:
            directory = stat.S_ISDIR(there.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            continue  # the one above says which of them is a file
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidConfig(f"cannot write into {path}: {reason}") from None
        if not directory:
            raise InvalidConfig(f"{there} is not a directory; choose another place for the output")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InvalidConfig(f"{there} cannot be written; choose another place for the output")
        return


def make_folder(path: Path) -> None:
    """Make the directory `path` unless it is there. Raises as `check_folder`, or OutOfResources."""
    check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(f"cannot make the folder {path}: {error.strerror}", error) from None


def give_folder(draft: Path, place: Path) -> None:
    """Give the folder `draft` the name `place`, of an empty folder or of nothing, on the same file system.

    Raises InvalidConfig, OutOfResources as `new_file`.
    """
    try:
        draft.rename(place)
    except OSError as error:
        raise write_error(f"cannot make {place}: {error.strerror}", error) from None


def utf8(text: str) -> str:
    """`text` as UTF-8 can say it. A path may hold other bytes; each is shown as "\\xff"."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, which no path has
        return text.encode("utf-8", "backslashreplace").decode()


def utf8_document(value: Any) -> Any:
    """`value` with each text in it, also in keys, as `utf8` gives it: what JSON can be made of."""
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, Path):
        return utf8(str(value))
    if isinstance(value, Mapping):
        return {utf8_document(key): utf8_document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [utf8_document(item) for item in value]
    return value


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "no regular file")


def _draft(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, with the mode that it has or would have."""
    # Not made from the name, which may already be as long as names can be.
    draft = target.with_name(f".slosched-{os.getpid()}-{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    with suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
    return draft, descriptor


def _give_name(draft: Path, target: Path, replacing: bool) -> None:
    if replacing:
        draft.replace(target)
        return
    try:
        os.link(draft, target)  # unlike a rename, it fails where the name is taken
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        draft.replace(target)
