"""What a repository offers: its versions, what is wrong with the others, and what of it a worker can offer."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from slosched.config import MOST_PUT_ASIDE, PUT_ASIDE_CHARS, ModelSource, canonical_model
from slosched.model_source import split_version

#: Versions that one worker offers, and the bytes of their names: they travel in one message.
MOST_VERSIONS = 2_000
MOST_NAME_BYTES = 128 * 1024
MOST_NAMES = 10_000


class Version(msgspec.Struct, frozen=True, array_like=True):
    """One version of a model. `folder` is its path below the repository.

    `source` is its ModelSource in MessagePack: most versions are never loaded. `fingerprint` changes with any
    file of the folder (scanning.py). `cupy`: it is a model of CuPy functions.
    """

    name: str  # NAME:VERSION
    folder: str
    source: bytes
    fingerprint: str
    cupy: bool = False

    def model_source(self) -> ModelSource:
        """Where the model comes from; its paths are below `folder`."""
        return _decode(self.source)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ModelSource).decode


def packed(source: ModelSource) -> bytes:
    """`source` as a Version has it."""
    return _encode(source)


class Listing(msgspec.Struct, frozen=True, array_like=True):
    """What a repository holds: versions, the newest of each name first, and (name, reason) of the others."""

    versions: tuple[Version, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


def offered(listing: Listing, own: Collection[str], no_cupy: str = "") -> Listing:
    """What of `listing` a worker offers beside its `own` models, which keep their plain names.

    `no_cupy` says why it cannot run models of CuPy functions; empty if it can. The first of its versions count
    where there are too many. The worker's loop calls this, so it is quick.
    """
    left_out = list(listing.left_out)
    taken = set(own)
    clashing: set[str] = set()
    kept: list[Version] = []
    names, name_bytes = len(own), sum(len(name.encode()) for name in own)
    beyond = 0
    for version in listing.versions:
        plain = version.folder.partition("/")[0]
        if canonical_model(plain) in taken or version.name in taken:
            clashing.add(plain)
            continue
        if version.cupy and no_cupy:
            left_out.append((version.name, no_cupy))
            continue
        names, name_bytes = names + 1, name_bytes + len(version.name)  # they are ASCII
        if names > MOST_NAMES or len(kept) >= MOST_VERSIONS or name_bytes > MOST_NAME_BYTES:
            beyond += 1
        else:
            kept.append(version)
    left_out[:0] = [
        (name, "the worker has a model of its own with that name: rename the folder")
        for name in sorted(clashing)
    ]
    if beyond:
        text = (
            f"{beyond} of the older versions: a worker offers at most {MOST_VERSIONS}, whose names take "
            f"at most {MOST_NAME_BYTES} bytes"
        )
        left_out.insert(0, ("*", text))
    return Listing(tuple(kept), _bounded(left_out))


def newest_first(versions: Iterable[Version]) -> list[Version]:
    """`versions` by how many newer ones of the same name there are, then by name."""
    by_name: dict[str, list[Version]] = {}
    for version in versions:
        by_name.setdefault(split_version(version.name)[0], []).append(version)
    ranked: list[tuple[int, str, Version]] = []
    for name, found in by_name.items():
        found.sort(key=lambda version: -split_version(version.name)[1])
        ranked += [(rank, name, version) for rank, version in enumerate(found)]
    return [version for _, _, version in sorted(ranked, key=lambda each: each[:2])]


def _bounded(left_out: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """What a message may say of it: some entries, and the number of the others."""
    cut = [(name[:PUT_ASIDE_CHARS], reason[:PUT_ASIDE_CHARS]) for name, reason in left_out]
    if len(cut) <= MOST_PUT_ASIDE:
        return tuple(cut)
    rest = len(cut) - MOST_PUT_ASIDE + 1
    return (*cut[: MOST_PUT_ASIDE - 1], ("...", f"and {rest} more"))
