"""When a request whose action came to nothing is planned anew, and when that cannot help.

second_tries.py has those whose model or process failed.
"""

from __future__ import annotations

from slosched.codes import Code, code_name
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.base import Policy
from slosched.core.scheduler.state import ActionState, Request

#: A request whose actions keep failing is answered after this many, not counting those in which the model
#: or its process failed.
_MAX_ATTEMPTS = 3
#: How a worker that has said goodbye fails what it has not begun.
_HANDED_BACK = (Code.CANCELLED, Code.SHUTTING_DOWN)


def was_handed_back(action: ActionState, code: int) -> bool:
    """Whether a worker that leaves gave the action back: an attempt that does not count."""
    return action.gpu.worker.leaving and code in _HANDED_BACK


def is_pointless(request: Request, cluster: Cluster, policy: Policy, now_ns: int) -> bool:
    """Whether another plan cannot help: the attempts are spent, it is late, or nothing could run it."""
    return (
        request.attempts - request.excused >= _MAX_ATTEMPTS
        or now_ns >= request.deadline_ns
        or not cluster.gpus
        or not policy.replans
    )


def why_failed(code: int, reason: str) -> str:
    """The words of the answer: what the code means, and what the worker said."""
    return f"{code_name(code)}: {reason}" if reason else code_name(code)
