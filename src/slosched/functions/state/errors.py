"""What can go wrong with state. Each error leaves the global tier as it was before the call."""

from __future__ import annotations

from slosched.errors import InvalidConfig, OutOfResources, PeerUnreachable, SloschedError


class StoreLost(PeerUnreachable):
    """The store's connection was lost. The next call connects again; a push that it interrupted is repeated
    by the next push of the key, and counts once."""


class NamespaceInUse(InvalidConfig):
    """Another run's keys are in the namespace, so this run does not start."""


class KeyMismatch(InvalidConfig):
    """The key exists with another shape, dtype or merge."""


class KeyDeleted(SloschedError):
    """The key was deleted, its namespace was dropped, or the store restarted without it."""


class StateLimit(OutOfResources):
    """The namespace would exceed its limit of bytes or keys."""


class LockTimeout(SloschedError):
    """The lock of a key was not free within the time allowed."""


class LockLost(SloschedError):
    """The lease of a held lock ran out, so another may have the lock; the push was not made."""
