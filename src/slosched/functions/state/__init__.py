"""Two-tier state: arrays by name that calls on many hosts share (docs/state.md).

The local tier is one copy per host in shared memory, the global tier Redis, or files of this host alone.
"""

from slosched.functions.state.array import StateArray
from slosched.functions.state.errors import (
    KeyDeleted,
    KeyMismatch,
    LockLost,
    LockTimeout,
    NamespaceInUse,
    StateLimit,
    StoreLost,
)
from slosched.functions.state.opening import open_store
from slosched.functions.state.state import State
from slosched.functions.state.store import Limits

__all__ = [
    "KeyDeleted",
    "KeyMismatch",
    "Limits",
    "LockLost",
    "LockTimeout",
    "NamespaceInUse",
    "State",
    "StateArray",
    "StateLimit",
    "StoreLost",
    "open_store",
]
