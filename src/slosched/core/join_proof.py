"""How a worker proves that it holds the cluster's join key without sending it.

The controller sends a nonce that it never sent before and takes once. The worker answers with the HMAC-SHA256
under the key of the nonce and of everything that it claims: a proof that was listened to is worth nothing in
another message, and nothing the second time.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from slosched.join_messages import Register

_encode = msgspec.msgpack.Encoder().encode
_PURPOSE = "slosched join 1"


def proof_of(key: bytes, message: Register) -> bytes:
    """The proof that belongs into `message`, which has its nonce already."""
    claims = (
        _PURPOSE,
        message.nonce,
        message.protocol,
        message.incarnation,
        message.name,
        message.host,
        message.port,
    )
    return hmac.digest(key, _encode(claims), hashlib.sha256)


def is_proven(key: bytes, message: Register) -> bool:
    return hmac.compare_digest(proof_of(key, message), message.proof)


def nth_nonce(seed: bytes, number: int) -> bytes:
    """A nonce for each `number`; only the holder of `seed` can foresee it."""
    return hmac.digest(seed, number.to_bytes(8, "big"), hashlib.sha256)
