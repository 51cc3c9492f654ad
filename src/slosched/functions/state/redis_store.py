"""The global tier in Redis (or Valkey): for many hosts. The one module that imports the package redis.

Values lie in chunks of 1 MiB, so no command and no reply is much larger. A push uploads its chunks under
names that expire and one script moves them into place: nothing half-written is ever visible, and a killed push
leaves nothing. Readers compare the key's version before and after, and read again if it moved.

Sums and maxima are computed by the client, in NumPy, while it holds the key's merge mutex; the script that
commits refuses if the mutex was lost meanwhile (its token is the fence). Lua on the server would compute with
doubles alone, wrong for large int64, and hold up every other client meanwhile: docs/state.md has the times.

No command is retried: the caller would not know whether it was made. Each error is a StoreLost; the connection
is made anew by the next call, and a commit's number tells it whether the last one arrived.
"""

from __future__ import annotations

import os
import shlex
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np

from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig, MissingPackage, SloschedError
from slosched.functions.state import folders, lua
from slosched.functions.state.embedded import deleted_error, dropped_error, limit_error
from slosched.functions.state.errors import (
    LockLost,
    LockTimeout,
    NamespaceInUse,
    StateLimit,
    StoreLost,
)
from slosched.functions.state.ranges import Bytes, Part, Ranges, cut, gathered, total, within
from slosched.functions.state.store import DEFAULT_WAIT_NS, Commit, KeyInfo, Limits, Mode

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise MissingPackage(
        "the Redis store needs the package redis: pip install 'slosched[state]'"
    ) from error

CHUNK_BYTES = 2**20
#: Chunks sent or read at a time.
_BATCH = 8
#: A chunk with more ranges than this is read from its first to its last at once.
_RANGES_READ_APART = 16
#: A chunk with more ranges than this is sent as a mask and its data: each range holds up the server's other
#: clients for 2 us, both operations on the bits of a whole chunk of 1 MiB for less than 300 us.
_RANGES_SENT_APART = 250
_EACH_BIT = 0xFF
_STAGED_MS = 60_000
_LEASE_MS = 10_000
_MERGE_LEASE_MS = 2_000
_TIMEOUT_S = 5.0
_LONGEST_NAP_NS = 5_000_000
#: Times that something which changed while it was read is read again.
_READS = 4
_PREFIX = "slosched:state:"
_NAMES = "slosched:namespaces"
_STARTED = "slosched:started"


class RedisStore:
    """`address`: redis://[[USER]:PASSWORD@]HOST:PORT[/DB], rediss:// or unix://PATH."""

    def __init__(self, address: str) -> None:
        try:
            self.client: Any = redis.Redis.from_url(
                address,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
            parts = urlsplit(address)
            place = f"{parts.hostname or ''}:{parts.port or 6379}" if parts.scheme != "unix" else ""
        except ValueError as error:
            raise InvalidConfig(f"{address[:80]!r} is not an address of Redis: {error}") from None
        # Without the password: messages show it, and it names the local copy.
        self.name = f"{parts.scheme}://{place}{parts.path}"
        self.scripts = {
            name: self.client.register_script(text)
            for name, text in vars(lua).items()
            if name.isupper()
        }

    def describe(self) -> str:
        return f"Redis at {self.name}"

    def call(self, script: str, keys: list[str], args: list[Any]) -> Any:
        with self.speaking():
            return self.scripts[script](keys=keys, args=args)

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Errors of redis become ours."""
        try:
            yield
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise InvalidConfig(f"{self.name} refuses this client: {error}") from None
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise StoreLost(
                f"the store {self.name} does not answer: {error}; "
                "is it running? (`slosched state up` starts one)"
            ) from None
        except redis.OutOfMemoryError as error:
            raise StateLimit(f"{self.name} is out of memory: {error}") from None
        except redis.RedisError as error:
            raise SloschedError(f"{self.name} failed: {error}") from None

    def process_id(self) -> int:
        """The server's; 0 if none answers."""
        with suppress(redis.RedisError, OSError):
            self.client.ping()  # refused while the server reads what it kept
            return int(self.client.info("server")["process_id"])
        return 0

    def mark(self) -> None:
        """Note in the server that `slosched state up` started it."""
        with self.speaking():
            self.client.set(_STARTED, self.process_id())

    def shut_down(self) -> None:
        """End the server. Raises InvalidConfig if `slosched state up` did not start it."""
        with self.speaking():
            if self.client.get(_STARTED) != b"%d" % self.process_id():
                raise InvalidConfig(
                    f"`slosched state up` did not start the server at {self.name}; end it yourself"
                )
            self.client.shutdown()

    def open(self, namespace: str, *, own: bool, limits: Limits) -> RedisSpace:
        with self.speaking():
            memory = self.client.info("memory")
        policy = str(memory.get("maxmemory_policy", ""))
        if memory.get("maxmemory") and policy.startswith("allkeys"):
            raise InvalidConfig(
                f"{self.name} may evict values (maxmemory-policy {policy}), which would then read as zeros; "
                "set maxmemory-policy noeviction"
            )
        owner = f"{socket.gethostname()}, process {os.getpid()}"
        space = _space_key(namespace)
        args = [int(own), owner, limits.keys, limits.bytes, namespace, os.urandom(8).hex()]
        found = self.call("OPEN", [space, _NAMES], args)
        if not found[0]:
            raise NamespaceInUse(
                f"namespace {namespace!r} of {self.name} has {int(found[2]):,} key(s) of another run "
                f"({found[1].decode()}); end that run, or remove them with `slosched state drop "
                f"{shlex.quote(namespace)} "
                f"--store {self.name}`"
            )
        return RedisSpace(self, namespace, found[1].decode())

    def namespaces(self) -> Mapping[str, tuple[int, int]]:
        found = {}
        with self.speaking():
            for name in sorted(self.client.smembers(_NAMES)):
                keys, size = self.client.hmget(_space_key(name.decode()), "keys", "bytes")
                found[name.decode()] = (int(keys or 0), int(size or 0))
        return found

    def drop(self, namespace: str) -> bool:
        with self.speaking():
            if not self.client.sismember(_NAMES, namespace):
                return False
            found = self.client.hget(_space_key(namespace), "id")
        RedisSpace(self, namespace, (found or b"").decode()).drop()
        return True

    def close(self) -> None:
        with suppress(redis.RedisError, OSError):
            self.client.close()


class RedisSpace:
    """One namespace. `id` differs from that of one of the same name made after it was dropped."""

    def __init__(self, store: RedisStore, namespace: str, id: str) -> None:
        self._store, self._namespace, self._id = store, namespace, id
        self._client = store.client
        self._key = _space_key(namespace)
        self._merging = threading.local()

    def declare(self, info: KeyInfo) -> KeyInfo:
        text = msgspec.json.encode(info)
        args = [info.key, self._at(info.key), info.id, text, info.nbytes, self._id]
        found = self._store.call("DECLARE", [self._key], args)
        self._check_limit(found, info.nbytes)
        if found[0] != b"is":
            raise dropped_error(self._namespace)
        return _declared(found[1], found[2])

    def find(self, key: str) -> KeyInfo | None:
        with self._store.speaking():
            text, appended = self._client.hmget(f"{self._at(key)}:m", "info", "appended")
        return _declared(text, appended) if text is not None else None

    def read(self, info: KeyInfo, part: Part) -> Bytes:
        """Where commits keep coming in between, it waits for a gap with the mutex."""
        ranges = part.ranges * info.itemsize
        for _ in range(_READS):
            found = self._try_read(info, "c", ranges)
            if found is not None:
                return found
        if getattr(self._merging, "token", ""):
            raise LockLost(f"the merge mutex of {info.key!r} was lost during the push; push again")
        with self.merge_lock(info):
            found = self._try_read(info, "c", ranges)
        if found is None:
            raise LockTimeout(f"key {info.key!r} is written without a gap; read again")
        return found

    def _try_read(
        self, info: KeyInfo, part: str, ranges: Ranges, version: bytes | None = None
    ) -> Bytes | None:
        """The bytes of chunks ("c") or of the log ("a"); None if they were of more than one version."""
        stamp = "version" if part == "c" else "cleared"
        at, meta = self._at(info.key), f"{self._at(info.key)}:m"
        pieces = cut(ranges, CHUNK_BYTES)
        data = np.empty(total(ranges), np.uint8)
        done = 0
        for first in range(0, max(1, len(pieces)), _BATCH):
            batch = pieces[first : first + _BATCH]
            with self._store.speaking(), self._client.pipeline(transaction=True) as pipe:
                pipe.hmget(meta, "id", stamp)
                for chunk, each in batch:
                    for start, stop in _read_apart(each):
                        pipe.getrange(f"{at}:{part}:{chunk}", int(start), int(stop) - 1)
                replies = iter(pipe.execute())
            found, seen = next(replies)
            if found is None or found.decode() != info.id:
                raise deleted_error(info)
            if version is not None and seen != version:
                return None
            version = seen
            for _, each in batch:
                for (start, stop), parts in zip(_read_apart(each), _parts(each), strict=True):
                    got = np.zeros(int(stop - start), np.uint8)  # what was never written is 0
                    text = np.frombuffer(next(replies), np.uint8)
                    got[: len(text)] = text
                    size = total(parts)
                    data[done : done + size] = gathered(got, within(parts - start))
                    done += size
            if getattr(self._merging, "token", ""):
                self._renew_mutex(info)
        return data

    @contextmanager
    def merge_lock(self, info: KeyInfo) -> Iterator[None]:
        token, key = os.urandom(8).hex(), f"{self._at(info.key)}:x"

        def take() -> bool:
            with self._store.speaking():
                return bool(self._client.set(key, token, nx=True, px=_MERGE_LEASE_MS))

        _wait(take, DEFAULT_WAIT_NS, f"another push of {info.key!r} did not end")
        self._merging.token = token
        try:
            yield
        finally:
            self._merging.token = ""
            with suppress(StoreLost):
                self._store.call("MUTEX", [key], [token, 0])

    def _renew_mutex(self, info: KeyInfo) -> None:
        args = [self._merging.token, _MERGE_LEASE_MS]
        if not self._store.call("MUTEX", [f"{self._at(info.key)}:x"], args):
            raise LockLost(f"the merge mutex of {info.key!r} was lost during the push; push again")

    def commit(self, info: KeyInfo, commit: Commit) -> str:
        token = getattr(self._merging, "token", "")
        staged = f"{self._at(info.key)}:s:{os.urandom(8).hex()}:"
        what = self._stage(info, commit, staged)
        args = [info.id, token, commit.token, commit.writer, commit.number, staged, *what]
        answer = ""

        def take() -> bool:
            nonlocal answer
            answer = self._store.call("COMMIT", [self._at(info.key)], args).decode()
            return bool(answer != "busy")

        _wait(take, DEFAULT_WAIT_NS, f"other pushes of {info.key!r} did not end")
        if answer == "gone":
            raise deleted_error(info)
        if answer in ("lost", "missing"):
            raise LockLost(f"the push of {info.key!r} took too long and was not made; push again")
        if answer == "unlocked":
            raise _unlocked(info)
        return answer.removeprefix("ok ") if answer != "done" else ""

    def _stage(self, info: KeyInfo, commit: Commit, staged: str) -> list[Any]:
        """Upload the chunks. Returns the kind and number of each."""
        what: list[Any] = []
        done = 0
        data = np.ascontiguousarray(commit.data).view(np.uint8).data
        pieces = cut(commit.part.ranges * info.itemsize, CHUNK_BYTES)
        for first in range(0, len(pieces), _BATCH):
            with self._store.speaking(), self._client.pipeline(transaction=False) as pipe:
                for chunk, each in pieces[first : first + _BATCH]:
                    size = total(each)
                    blob: Any = data[done : done + size]
                    done += size
                    length = min(CHUNK_BYTES, info.nbytes - chunk * CHUNK_BYTES)
                    kind = "F" if size == length else "P"
                    if kind == "P" and len(each) > _RANGES_SENT_APART:
                        kind = "M"
                        keep, blob = _masked(length, each, blob)
                        pipe.set(f"{staged}{chunk}:k", keep, px=_STAGED_MS)
                    elif kind == "P":
                        table = np.stack([each[:, 0], each[:, 1] - each[:, 0]], axis=1)
                        head = struct.pack("<I", len(each)) + table.astype("<u4").tobytes()
                        blob = head + bytes(blob)
                    pipe.set(f"{staged}{chunk}", blob, px=_STAGED_MS)
                    what += [kind, chunk]
                pipe.execute()
            if getattr(self._merging, "token", ""):
                self._renew_mutex(info)
        return what

    def version(self, info: KeyInfo) -> str:
        with self._store.speaking():
            found, version = self._client.hmget(f"{self._at(info.key)}:m", "id", "version")
        if found is None or found.decode() != info.id:
            raise deleted_error(info)
        return str(version.decode())

    def committed(self, info: KeyInfo, writer: str) -> int:
        with self._store.speaking():
            found, number = self._client.hmget(f"{self._at(info.key)}:m", "id", f"writer:{writer}")
        if found is None or found.decode() != info.id:
            raise deleted_error(info)
        return int(number or 0)

    def clear(self, info: KeyInfo, *, values: bool) -> None:
        self._remove(info.key, info.id, "values" if values else "log", info)

    def append(self, info: KeyInfo, data: bytes, *, token: int) -> None:
        args = [info.id, CHUNK_BYTES, data, token]
        found = self._store.call("APPEND", [self._at(info.key), self._key], args)
        self._check_limit(found, len(data))
        if found[0] == b"unlocked":
            raise _unlocked(info)
        if found[0] != b"ok":
            raise deleted_error(info)

    def appended(self, info: KeyInfo, start: int) -> bytes:
        meta = f"{self._at(info.key)}:m"
        for _ in range(_READS):
            with self._store.speaking():
                found, size, cleared = self._client.hmget(meta, "id", "appended", "cleared")
            if found is None or found.decode() != info.id:
                raise deleted_error(info)
            if start >= int(size):
                return b""
            # What is appended meanwhile lies behind; only a log that was emptied must be read again.
            data = self._try_read(info, "a", np.array([[start, int(size)]]), cleared)
            if data is not None:
                return data.tobytes()
        raise LockTimeout(f"the log of {info.key!r} is emptied again and again; read it again")

    def lock(self, info: KeyInfo, mode: Mode, timeout_ns: int) -> _Lease:
        token = asked_ns = 0

        def take() -> bool:
            nonlocal token, asked_ns
            asked_ns = now_ns()
            token = int(self._store.call("LOCK", [self._at(info.key)], [info.id, mode, _LEASE_MS]))
            if token < 0:
                raise deleted_error(info)
            return token > 0

        _wait(take, timeout_ns, f"the {mode} lock of {info.key!r} was not free")
        return _Lease(self._store, self._at(info.key), info.key, mode, token, asked_ns)

    def keys(self) -> list[KeyInfo]:
        with self._store.speaking():
            names = sorted(self._client.smembers(f"{self._key}:keys"))
        found = (self.find(name.decode()) for name in names)
        return [each for each in found if each is not None]

    def delete(self, key: str) -> None:
        self._remove(key, "", "key", None)

    def drop(self) -> None:
        answer = b"more"
        while answer == b"more":
            with self._store.speaking():
                names = self._client.smembers(f"{self._key}:keys")
            for name in names:
                self.delete(name.decode())
            args = [self._id, self._namespace]
            answer = self._store.call("DROP", [self._key, _NAMES], args)

    def close(self) -> None:
        """The store has the connections."""

    def _remove(self, key: str, number: str, what: str, info: KeyInfo | None) -> None:
        keys = [self._at(key), self._key]
        args = [number, CHUNK_BYTES, what, key, self._id, os.urandom(8).hex()]
        answer = self._store.call("REMOVE", keys, args)
        if answer == b"gone" and info is not None:
            raise deleted_error(info)

    def _check_limit(self, found: list[Any], more: int) -> None:
        if found[0] == b"limit":
            keys, size, most_keys, most_bytes = map(int, found[1:])
            raise limit_error(size, keys, more, Limits(bytes=most_bytes, keys=most_keys))

    def _at(self, key: str) -> str:
        return f"{self._key}:{folders.digest(key)}"


class _Lease:
    """A lock with a lease, renewed by a thread while it is held."""

    def __init__(
        self, store: RedisStore, at: str, key: str, mode: Mode, token: int, asked_ns: int
    ) -> None:
        self._store, self._at, self._name, self._mode = store, at, key, mode
        self.token = token if mode == "write" else 0
        self._number, self._lost, self._over = token, False, threading.Event()
        self._until_ns = asked_ns + _LEASE_MS * 1_000_000
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._keep, name="state-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        # A process that was stopped may come here before its thread has noticed.
        if self._lost or (not self._over.is_set() and now_ns() > self._until_ns):
            raise LockLost(f"the lease of the {self._mode} lock of {self._name!r} ran out")

    def release(self) -> None:
        self._over.set()
        if os.getpid() != self._pid:
            return  # a fork's copy; its parent holds the lock
        self._thread.join(2 * _TIMEOUT_S)
        if not self._renewed(0):
            self._lost = True

    def _keep(self) -> None:
        while not self._over.wait(_LEASE_MS / 3e3):
            asked_ns = now_ns()
            try:
                held = self._renewed(_LEASE_MS)
            except SloschedError:
                held = now_ns() < self._until_ns  # the store may be back in time
            else:
                self._until_ns = asked_ns + _LEASE_MS * 1_000_000
            if not held:
                self._lost = True
                return

    def _renewed(self, lease_ms: int) -> bool:
        args = [self._mode, self._number, lease_ms]
        return bool(self._store.call("RENEW", [self._at], args))


def _wait(take: Callable[[], bool], timeout_ns: int, failed: str) -> None:
    """Call `take` until it succeeds. Raises LockTimeout."""
    until_ns, nap_ns = now_ns() + timeout_ns, 200_000
    while not take():
        if now_ns() >= until_ns:
            raise LockTimeout(f"{failed} within {timeout_ns / 1e9:g} s; its holder may be stopped")
        sleep_ns(nap_ns)
        nap_ns = min(2 * nap_ns, _LONGEST_NAP_NS)


def _masked(length: int, ranges: Ranges, data: Any) -> tuple[bytes, bytes]:
    """Ranges of a chunk of `length` bytes: a mask with each bit set of what stays, and the data amid zeros."""
    edges = np.zeros(length + 1, np.int8)
    edges[ranges[:, 0]] += 1
    edges[ranges[:, 1]] -= 1
    changed = np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)
    values = np.zeros(length, np.uint8)
    values[changed] = np.frombuffer(data, np.uint8)
    return (~changed * np.uint8(_EACH_BIT)).tobytes(), values.tobytes()


def _unlocked(info: KeyInfo) -> LockLost:
    return LockLost(f"the lease of the write lock of {info.key!r} ran out; nothing was written")


def _read_apart(ranges: Ranges) -> Ranges:
    """What is asked for of a chunk: its ranges, or one from the first to the last of many."""
    if len(ranges) <= _RANGES_READ_APART:
        return ranges
    return np.array([[ranges[0, 0], ranges[-1, 1]]])


def _parts(ranges: Ranges) -> list[Ranges]:
    """Which ranges each reply for `_read_apart` holds."""
    return list(ranges[:, None, :]) if len(ranges) <= _RANGES_READ_APART else [ranges]


def _declared(text: bytes, appended: bytes) -> KeyInfo:
    info = msgspec.json.decode(text, type=KeyInfo)
    return msgspec.structs.replace(info, appended=int(appended))


def _space_key(namespace: str) -> str:
    return _PREFIX + quote(namespace, safe="")
