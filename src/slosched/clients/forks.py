"""Whether this process is a fork of the one in which a client was made.

A fork has the client's sockets, but not the threads that work for it: a call would wait for ever. What it
sent would also come from the parent's identity.
"""

from __future__ import annotations

import os

from slosched.codes import Code
from slosched.errors import ConnectionLost

_generation = 0


def _forked() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_forked)


def generation() -> int:
    """How many forks lie between this process and the first: another number in a child."""
    return _generation


def forked_error() -> ConnectionLost:
    """What a call in a child raises."""
    return ConnectionLost(
        "this client was made before the process was forked and serves the parent alone; connect again "
        "in the child, or start children with multiprocessing's 'spawn'",
        code=Code.CANCELLED,
    )
