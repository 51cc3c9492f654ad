"""What a worker that registers and its controller say, over the port that clients use (membership.py).

The rules for change are those of messages.py. After a registration the controller connects to the worker, and
the two speak as with a worker of its list.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from slosched.messages import Message, Name, Number, Text

#: A nonce, or an HMAC-SHA256.
Secret = Annotated[bytes, msgspec.Meta(max_length=64)]


class Register(Message, frozen=True, kw_only=True):
    """A worker asks for a place under `name`. The controller reaches it at `host`:`port`.

    `host` is an IP address; empty: the address that this message comes from. `incarnation` is random, one
    per process start. `proof` answers the Challenge `nonce` (core/join_proof.py); both are empty at first.
    """

    protocol: Number
    incarnation: Number
    name: Name
    host: Name
    port: Number
    nonce: Secret = b""
    proof: Secret = b""


class Challenge(Message, frozen=True):
    """The controller wants proof of the join key: register again with this `nonce`, which holds once."""

    nonce: Secret


class Registered(Message, frozen=True):
    """The worker has the place `worker_id`. `drained`: an operator keeps it out of use."""

    worker_id: Number
    drained: bool = False


class RegistrationRefused(Message, frozen=True):
    """The worker gets no place. With the code INITIALIZING it may get one within seconds."""

    code: Number
    reason: Text


MembershipReply = Challenge | Registered | RegistrationRefused
