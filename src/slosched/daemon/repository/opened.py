"""A version's files for those who build its model: opened below the repository, as the last look saw them.

Weights are copied into memory of this process first. A file that is written to or cut short meanwhile could
otherwise give half a model, or end the process that has it mapped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slosched.config import ModelSource
from slosched.daemon.repository.beneath import open_below, read_below, root_of
from slosched.daemon.repository.describing import (
    CONFIG,
    INDEX,
    MOST_CONFIG_BYTES,
    MOST_INDEX_BYTES,
    PT2,
    SAFETENSORS,
    shards_in,
)
from slosched.daemon.repository.listing import Version
from slosched.daemon.repository.modules import Packages
from slosched.daemon.repository.scanning import files_of, in_words, look_at_version
from slosched.errors import InvalidConfig

_PIECE_BYTES = 8 << 20
_MOST_SOURCE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Opened:
    """Where a model comes from, and the digest of all files of its version, by content."""

    source: ModelSource
    digest: str


@contextmanager
def opened(repository: str, version: Version, packages: Packages) -> Iterator[Opened]:
    """Where the model of `version` comes from, with paths and modules that are good until the block ends.

    Raises InvalidConfig if the files are not those that the version was offered with. One that is raised within
    the block names the version's own files instead.
    """
    place = Path(repository, version.folder)
    source = version.model_source()
    shown: dict[str, str] = {}
    with ExitStack() as stack:
        try:
            root = stack.enter_context(root_of(repository))
            _check(root, version)
            source = _with_paths(stack, root, version.folder, source, shown)
            if source.factory or source.cupy:
                package = _package(root, version, place, packages)
                shown[f"{package}."] = ""
                source = replace(
                    source,
                    factory=source.factory and f"{package}.{source.factory}",
                    cupy=source.cupy and f"{package}.{source.cupy}",
                    folder="",
                )
            digest = digest_of(root, version.folder)
            _check(root, version)
        except OSError as error:
            raise InvalidConfig(f"model {version.name!r}: {place}: {in_words(error)}") from None
        try:
            yield Opened(source, digest)
        except InvalidConfig as error:
            text = str(error)
            for path in sorted(shown, key=len, reverse=True):  # one may begin another
                text = text.replace(path, shown[path])
            raise InvalidConfig(text + _hint(text, version, root)) from None


def digest_of(root: int, folder: str) -> str:
    """A digest of the names and contents of all files of a version. Raises InvalidConfig, OSError."""
    digest = hashlib.sha256()
    for path in files_of(root, folder):
        fd = open_below(root, f"{folder}/{path}")
        with os.fdopen(fd, "rb", buffering=0) as file:
            digest.update(f"{path}\0{os.fstat(fd).st_size}\0".encode("utf-8", "surrogateescape"))
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def _check(root: int, version: Version) -> None:
    try:
        found = look_at_version(root, version.folder)
    except (OSError, InvalidConfig) as error:
        raise InvalidConfig(
            f"model {version.name!r}: {version.folder}: {in_words(error)}"
        ) from None
    if found.fingerprint != version.fingerprint:
        raise changed(version)


def changed(version: Version) -> InvalidConfig:
    """The error for a version whose files are others now."""
    return InvalidConfig(
        f"model {version.name!r}: the files of {version.folder} are not those that it was offered or "
        "loaded with; unload it and load it again, and write changes into a new version"
    )


def _with_paths(
    stack: ExitStack, root: int, folder: str, source: ModelSource, shown: dict[str, str]
) -> ModelSource:
    """`source` with paths to copies of its files; `shown` gets what stands for each in an error."""
    paths: dict[str, Any] = {}

    def weights(file: str) -> str:
        fd = open_below(root, f"{folder}/{file}")
        try:
            path = _copy_of(stack, fd, file)
        finally:
            os.close(fd)
        shown[path] = f"{folder}/{file}"
        return path

    def text(file: str, most_bytes: int) -> tuple[str, bytes]:
        data = read_below(root, f"{folder}/{file}", most_bytes=most_bytes)
        path = _held(stack, file, data)
        shown[path] = f"{folder}/{file}"
        return path, data

    if source.pt2:
        paths["pt2"] = weights(PT2)
    if Path(source.safetensors).name == INDEX:
        paths["safetensors"], index = text(INDEX, MOST_INDEX_BYTES)
        paths["shards"] = {shard: weights(shard) for shard in shards_in(index)}
    elif source.safetensors:
        paths["safetensors"] = weights(SAFETENSORS)
    if source.config:
        paths["config"], _ = text(CONFIG, MOST_CONFIG_BYTES)
    return replace(source, **paths)


def _memory(stack: ExitStack, name: str) -> int:
    fd = os.memfd_create(name)
    stack.callback(os.close, fd)
    return fd


def _held(stack: ExitStack, name: str, data: bytes) -> str:
    """The path of a file in memory that has `data`."""
    fd, left = _memory(stack, name), memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    return f"/proc/self/fd/{fd}"


def _copy_of(stack: ExitStack, fd: int, name: str) -> str:
    """The path of a copy of the file `fd` in memory, as long as the file is now."""
    copy, at, size = _memory(stack, name), 0, os.fstat(fd).st_size
    while at < size:
        sent = os.sendfile(copy, fd, at, min(_PIECE_BYTES, size - at))
        if not sent:
            raise InvalidConfig(f"{name} becomes shorter while it is read")
        at += sent
    return f"/proc/self/fd/{copy}"


def _package(root: int, version: Version, place: Path, packages: Packages) -> str:
    files: dict[str, str] = {}
    for path in _python_files(root, version.folder):
        data = read_below(root, f"{version.folder}/{path}", most_bytes=_MOST_SOURCE_BYTES)
        try:
            files[path] = data.decode()
        except UnicodeDecodeError:
            raise InvalidConfig(f"model {version.name!r}: {path} is not UTF-8 text") from None
    return packages.take(version.name, str(place), files)


def _python_files(root: int, folder: str) -> list[str]:
    return [path for path in files_of(root, folder) if path.endswith(".py")]


def _hint(text: str, version: Version, root: int) -> str:
    """What to write for `import other`, where other is a file of the folder."""
    try:
        stems = [path.removesuffix(".py") for path in _python_files(root, version.folder)]
    except (OSError, InvalidConfig):
        return ""
    for stem in stems:
        if f"No module named '{stem}'" in text:
            return f"; {stem}.py is a file of the version: write from . import {stem}"
    return ""
