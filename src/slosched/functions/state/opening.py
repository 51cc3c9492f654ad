"""A global tier by its address."""

from __future__ import annotations

from pathlib import Path

from slosched.errors import InvalidConfig
from slosched.functions.state.embedded import EmbeddedStore
from slosched.functions.state.store import Store

_REDIS = ("redis://", "rediss://", "unix://")


def open_store(address: str) -> Store:
    """ "embedded", "embedded:FOLDER" or "redis://HOST:PORT".

    Raises InvalidConfig for anything else, and MissingPackage without the package redis.
    """
    if address == "embedded":
        return EmbeddedStore()
    if address.startswith("embedded:") and len(address) > len("embedded:"):
        return EmbeddedStore(Path(address.removeprefix("embedded:")))
    if address.startswith(_REDIS):
        from slosched.functions.state.redis_store import RedisStore

        return RedisStore(address)
    raise InvalidConfig(
        f"{address[:80]!r} is not a store: take embedded, embedded:FOLDER or redis://HOST:PORT"
    )
