"""What the worker and the processes of its models say to each other (broods/packets.py has the packets)."""

from __future__ import annotations

import msgspec

from slosched.config import ModelProfile, WorkerConfig
from slosched.daemon.backends.broods.packets import Message
from slosched.daemon.repository.listing import Version

# ------------------------------------------------------------------------- worker to zygote


class Open(Message, frozen=True):
    """Import what the models of `config` need. `anchor_ns` is the worker's clock, `cpus` its cores."""

    config: WorkerConfig
    anchor_ns: int
    cpus: tuple[int, ...]


# ------------------------------------------------------------------------- zygote to worker


class Opened(Message, frozen=True):
    """Everything is imported. `names` can be loaded; `torch` is its version."""

    names: tuple[str, ...]
    torch: str


class OpenFailed(Message, frozen=True):
    """`kind` is the name of a class of slosched.errors, or another exception's."""

    kind: str
    words: str


# -------------------------------------------------------------------------- worker to child


class Prepare(Message, frozen=True):
    """Build `name`. With `known`, its profile, it is neither checked nor measured again.

    A model of the repository comes with its `version`, and one that was built before with the `digest` of its
    files, which must still be theirs: the version's fingerprint may not show a change.
    """

    name: str
    batches: tuple[int, ...]
    max_exec_ns: int
    known: ModelProfile | None = None
    own_state: tuple[str, ...] = ()
    version: Version | None = None
    digest: str = ""


class Classes(Message, frozen=True):
    """Another child measured the model anew."""

    profile: ModelProfile
    own_state: tuple[str, ...]


class Load(Message, frozen=True):
    op_id: int
    model_id: int


class Evict(Message, frozen=True):
    model_id: int


class AddSlot(Message, frozen=True):
    """Memory for batches of the class (`batch`, `length`): inputs, then outputs. Its descriptor comes with
    this."""

    slot: int
    batch: int
    length: int
    outputs_at: int
    nbytes: int


class DropSlot(Message, frozen=True):
    slot: int


class Exec(Message, frozen=True):
    """Run the batch of a slot. Those of `rows` are in its inputs, and the others are made up.

    The first `answers` rows of the output are written into the slot; 0: none is needed.
    """

    op_id: int
    model_id: int
    slot: int
    rows: tuple[int, ...]
    answers: int


ToChild = Prepare | Classes | Load | Evict | AddSlot | DropSlot | Exec

# -------------------------------------------------------------------------- child to worker


class Progress(Message, frozen=True):
    """A step of the preparation has ended, and it continues; `words` are human-readable."""

    words: str = ""


class Prepared(Message, frozen=True):
    """`pads` are what inputs are padded with, by name, where that is not 0; `digest` is of its files."""

    profile: ModelProfile
    random_weights: bool
    labels: tuple[str, ...]
    own_state: tuple[str, ...] = ()
    pads: dict[str, float] = msgspec.field(default_factory=dict)
    digest: str = ""


class PrepareFailed(Message, frozen=True):
    code: int
    words: str


class Done(Message, frozen=True):
    """An op has ended; `code` other than 0 says that it failed. Times are the worker's clock."""

    op_id: int
    begin_ns: int
    end_ns: int
    code: int = 0
    words: str = ""


FromChild = Progress | Prepared | PrepareFailed | Done

to_open = msgspec.msgpack.Decoder(Open)
opened = msgspec.msgpack.Decoder(Opened | OpenFailed)
to_child = msgspec.msgpack.Decoder(ToChild)
from_child = msgspec.msgpack.Decoder(FromChild)
