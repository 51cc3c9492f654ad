"""Names of models as the protocol has them, with a version apart, and as the controller offers them.

A worker's repository offers NAME:VERSION. Any other name is that of version 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from slosched.fronts.errors import FrontError, Status
from slosched.gpu_profile import canonical_model

#: The version of a model that no repository has.
ONLY_VERSION = "1"


def is_version(text: str) -> bool:
    """Whether `text` is a version: a number from 1 on, without leading zeros."""
    return text.isascii() and text.isdecimal() and not text.startswith("0") and len(text) <= 18


def name_and_version(name: str) -> tuple[str, str]:
    """NAME:VERSION in two; the version is empty where the name has none."""
    base, colon, version = name.rpartition(":")
    return (base, version) if colon and base and is_version(version) else (name, "")


def asked_version(model: str, version: str) -> tuple[str, str]:
    """Name and version of a request, which may say the version in either place. Raises FrontError."""
    base, own = name_and_version(model)
    if own and version and own != version:
        raise FrontError(
            Status.INVALID_ARGUMENT,
            f"the model's name '{shortened(model)}' says version {own}, and the request version "
            f"{shortened(version)}",
        )
    version = version or own
    if version and not is_version(version):
        raise FrontError(
            Status.INVALID_ARGUMENT,
            f"failed to get model version from specified version string '{shortened(version)}' (details: "
            "stol), version should be an integral value > 0",
        )
    return base, version


def shortened(text: str) -> str:
    """A text of a client, as far as an error repeats it."""
    return text if len(text) <= 200 else f"{text[:200]}..."


class Offered:
    """What the workers offer: versions by name, and the controller's name of each.

    `left_out` has the reasons, by (name, version), of versions in repositories that none offers.
    """

    def __init__(
        self,
        loadable: Iterable[str] = (),
        functions: Iterable[str] = (),
        left_out: Iterable[tuple[str, str]] = (),
    ) -> None:
        passed_over = frozenset(functions)
        named = ((name_and_version(full), reason) for full, reason in left_out)
        self.left_out = {name: reason for name, reason in named if name[1]}
        self._versions: dict[str, dict[str, str]] = {}
        for full in loadable:
            if full in passed_over:
                continue
            base, version = name_and_version(full)
            of_base = self._versions.setdefault(base, {})
            if version:
                of_base[version] = full
            else:
                of_base.setdefault(ONLY_VERSION, full)  # NAME:1 goes before NAME
        for base, of_base in self._versions.items():
            self._versions[base] = dict(sorted(of_base.items(), key=lambda item: int(item[0])))

    def __len__(self) -> int:
        return len(self._versions)

    def __iter__(self) -> Iterator[str]:
        return iter(self._versions)

    def known(self, base: str) -> str:
        """The name under which `base` is offered: itself, or what it is another name of; empty: neither."""
        if base in self._versions:
            return base
        canonical = canonical_model(base)
        return canonical if canonical in self._versions else ""

    def versions(self, base: str) -> tuple[str, ...]:
        """Ascending; none for an unknown name."""
        return tuple(self._versions.get(base, ()))

    def newest(self, base: str) -> str:
        """Empty for an unknown name."""
        versions = self.versions(base)
        return versions[-1] if versions else ""

    def full(self, base: str, version: str) -> str:
        """The controller's name; empty if it is not offered."""
        return self._versions.get(base, {}).get(version, "")
