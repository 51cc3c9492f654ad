"""Which source a run was made by: digests of files, and what of it is another package's."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from slosched.extensions import Origin


def file_sha256(path: Path) -> str | None:
    """None if it cannot be read: the reader that needs it reports that, and no finished run matches None."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the names and bytes of all Python files in `folder` and below."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def code_from_outside(origins: Iterable[Origin | None]) -> dict[str, object]:
    """The entry of a manifest for code of other packages; empty if there is none.

    Besides package and version it has the digest of the package's source, or of the module's file: a version
    often stays the same while its author works.
    """
    found = [
        {
            "package": origin.package,
            "version": origin.version,
            "target": origin.target,
            "sha256": _source_sha256(origin.target.partition(":")[0].partition(".")[0]),
        }
        for origin in origins
        if origin is not None
    ]
    return {"from_outside": found} if found else {}


@functools.cache
def _source_sha256(module: str) -> str | None:
    """The source of an imported top-level module, as it was when first asked for; None if it has no file."""
    loaded = sys.modules.get(module)
    folders = [Path(each) for each in getattr(loaded, "__path__", ())]
    if folders:
        return folder_sha256(folders[0])
    file = getattr(loaded, "__file__", None)
    return file_sha256(Path(file)) if file else None
