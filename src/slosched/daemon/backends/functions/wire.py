"""What the worker and the processes of functions say to each other (broods/packets.py has the packets).

    worker -- root -- template of a function -- a process for each unfinished call

The root imports no code of others. It forks a template for each function that is loaded, which imports the
function's module and runs `init`; processes of calls are forked from that. A function for a GPU has no
template: what has touched CUDA must not fork, so each of its processes is forked from the root and loads by
itself.
"""

from __future__ import annotations

import msgspec

from slosched.daemon.backends.broods.packets import Message
from slosched.message_types import FunctionInfo, Name, Number, Text

#: A longer payload travels in shared memory (parcels.py).
INLINE_BYTES = 64 * 1024
#: Functions in one Found.
FOUND_AT_ONCE = 100

# ---------------------------------------------------------------------------- worker to root


class Open(Message, frozen=True):
    """`anchor_ns` is the worker's clock, `cpus` its cores.

    The `namespace` of the store `state`, if there is one, is the worker's own: if that is killed, the root
    drops it.
    """

    anchor_ns: int
    cpus: tuple[int, ...]
    state: str = ""
    namespace: str = ""


# ------------------------------------------------------------------- worker to a child of root


class Find(Message, frozen=True):
    """Import the modules of `specs` and answer with what they offer. `folder` is the worker's current one."""

    specs: tuple[str, ...]
    folder: str


class Load(Message, frozen=True, kw_only=True):
    """Import the module of `spec`, run the `init` of its function `name`, and make calls possible.

    With `forks`, a socket comes with this, over which the worker asks for forks of this process; without, this
    process runs calls itself, and no fork; `once`: a single one. A call may take `memory_bytes` more than its
    process has when it begins (0: no limit). `visible_gpu` is the CUDA device that it sees; empty: all. `state`
    and `namespace` are those of ctx.state; an empty `state` means that there is none. `sized` are other specs
    with functions that have size classes: a function that can chain imports them too, since the arguments of a
    child have their class from there.
    """

    spec: str
    name: str
    folder: str
    forks: bool
    memory_bytes: int
    visible_gpu: str = ""
    state: str = ""
    namespace: str = ""
    once: bool = False
    sized: tuple[str, ...] = ()


class Listed(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A function that a spec offers."""

    name: str
    spec: str
    info: FunctionInfo
    reset: str
    expected_ns: int
    memory_bytes: int
    prepares: bool  # its calls run a `prepare` first


class Found(Message, frozen=True):
    """Some of the functions. `more`: another Found follows."""

    functions: tuple[Listed, ...]
    more: bool


class Failed(Message, frozen=True):
    """What was asked for is not possible. `kind` is the name of a class of slosched.errors, or another's."""

    kind: str
    words: str


class Loaded(Message, frozen=True):
    """The function is ready, after `import_ns` and `init_ns`. `note` is human-readable, and often empty."""

    import_ns: int
    init_ns: int
    note: str = ""


ToLoader = Find | Load
FromLoader = Found | Failed | Loaded

# ------------------------------------------------------------------ worker to a call's process

# `call` is the key of the call: of one that has ended, a message may still be under way. A payload is in the
# message, or, if `size` says more than that, in shared memory, whose descriptor comes with the message.


class Begin(Message, frozen=True):
    call: int
    call_id: int
    deadline_ns: int
    size: int
    payload: bytes


class Deliver(Message, frozen=True):
    """A child of the call has been answered, with code 0 by the payload."""

    call: int
    child: int
    code: int
    reason: str
    size: int
    payload: bytes


class Resume(Message, frozen=True):
    """All that the call awaits was delivered, and it has a slot."""

    call: int


ToCall = Begin | Deliver | Resume

# ------------------------------------------------------------------ a call's process to worker


class Ready(Message, frozen=True):
    """The process can take a call. It has `own_bytes` of memory of its own."""

    pid: Number
    own_bytes: Number


class Chained(Message, frozen=True, kw_only=True):
    """The call asks for a child. It has run for `ran_ns` since its Begin or Resume."""

    child: Number
    function: Name
    size: Number
    payload: bytes
    slo_ns: Number = 0
    size_class: Number = 0
    near: Name = ""
    near_child: Number = -1
    ran_ns: Number = 0


class TakenBack(Message, frozen=True):
    child: Number


class Awaits(Message, frozen=True):
    """The call stands still until a Resume: behind its host part (it awaits nothing), or for `children`."""

    children: tuple[Number, ...]
    end_ns: Number


class Returned(Message, frozen=True):
    """The call has ended with a result. `again`: the process can take another call."""

    size: Number
    payload: bytes
    end_ns: Number
    again: bool


class Raised(Message, frozen=True):
    """The call has ended without a result, for the reason `text`."""

    code: Number
    text: Text
    end_ns: Number
    again: bool


FromCall = Ready | Chained | TakenBack | Awaits | Returned | Raised

to_root = msgspec.msgpack.Decoder(Open)
to_loader = msgspec.msgpack.Decoder(ToLoader)
from_loader = msgspec.msgpack.Decoder(FromLoader)
to_call = msgspec.msgpack.Decoder(ToCall)
from_call = msgspec.msgpack.Decoder(FromCall)
