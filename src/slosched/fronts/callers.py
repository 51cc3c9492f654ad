"""On whose behalf requests come: bearer tokens with a name, a weight and quotas, from a TOML file.

    [tokens.checkout]
    token = "..."                # or sha256 = "...", its digest in hex
    weight = 2.0                 # beside others' requests of 1
    requests_per_s = 500
    in_flight = 64
    bytes_in_flight = "256MiB"
    models = ["digits"]          # for it there are no others
    operator = true              # it may load and unload them, and read the metrics

Quotas count rows: a batch of eight is eight requests, as it is for the controller. Each gateway process counts
for itself.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from slosched.clock import now_ns
from slosched.config import WEIGHT_RANGE
from slosched.errors import InvalidConfig, InvalidDuration
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.names import name_and_version
from slosched.fronts.regions import Regions
from slosched.fronts.sessions import Session
from slosched.gpu_profile import canonical_model
from slosched.text_files import read_toml
from slosched.units import NS_PER_S, parse_bytes

#: Each token has a session with the controller of its own.
MOST_TOKENS = 256
#: A token has at most this multiple of what it and the others leave free: one alone has 8 of 9 parts, and
#: another finds room whatever their number is (Choudhury, Hahne: Dynamic Queue Length Thresholds, 1998).
MOST_OF_FREE = 8
_TOKEN = re.compile(r"[!-~]{8,512}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REALM = "give the header `Authorization: Bearer TOKEN`"
_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class TokenRow(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One table [tokens.NAME] of the file; None: without a limit."""

    token: str = ""
    sha256: str = ""
    weight: Annotated[float, msgspec.Meta(ge=WEIGHT_RANGE[0], le=WEIGHT_RANGE[1])] = 1.0
    requests_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    in_flight: _Positive | None = None
    bytes_in_flight: _Positive | str | None = None
    models: tuple[str, ...] | None = None
    operator: bool = False


class Quota:
    """What may be in flight at a time, and begin in a second. `whose` is for the words of a refusal."""

    __slots__ = (
        "_at_ns",
        "_credit",
        "bytes_now",
        "most_bytes",
        "most_rows",
        "per_s",
        "rows_now",
        "whose",
    )

    def __init__(
        self, whose: str, *, most_rows: int = 0, most_bytes: int = 0, per_s: float = 0.0
    ) -> None:
        self.whose = whose
        self.most_rows, self.most_bytes, self.per_s = most_rows, most_bytes, per_s
        self.rows_now = self.bytes_now = 0
        self._credit, self._at_ns = max(1.0, per_s), now_ns()

    def limit(self, *, most_rows: int, most_bytes: int, per_s: float) -> None:
        """Other limits from now on; what is in flight stays."""
        self.most_rows, self.most_bytes = most_rows, most_bytes
        if per_s != self.per_s:
            self.per_s = per_s
            self._credit, self._at_ns = max(1.0, per_s), now_ns()

    def take(self, rows: int, size: int, *, before: int = 0) -> None:
        """Begin `rows` requests with `size` bytes of inputs. Raises FrontError, 429; nothing is taken then.

        `before` were taken for the same batch already; a refusal is that of the whole.
        """
        try:
            self._check(rows, size, before)
        except FrontError:
            self._credit += before
            raise
        self.rows_now += rows
        self.bytes_now += size

    def _check(self, rows: int, size: int, before: int) -> None:
        if self.most_rows and self.rows_now + rows > self.most_rows:
            what = f"{self.most_rows:,} requests may be in flight"
            raise self._over(what, alone=rows + before > self.most_rows)
        if self.most_bytes and self.bytes_now + size > self.most_bytes:
            what = f"inputs of {self.most_bytes:,} bytes may be in flight"
            raise self._over(what, alone=size > self.most_bytes)
        if self.per_s:
            self._take_credit(rows, before)

    def _take_credit(self, rows: int, before: int) -> None:
        """A bucket holds a second's requests; one that asks for more than it ever holds takes all of it."""
        now, most = now_ns(), max(1.0, self.per_s)
        credit = min(most, self._credit + (now - self._at_ns) * self.per_s / NS_PER_S)
        self._credit, self._at_ns = credit, now
        wanted = min(rows + before, most) - min(before, most)
        if credit < wanted:
            raise self._over(f"{self.per_s:g} requests/s", (wanted - credit) / self.per_s)
        self._credit = credit - rows  # perhaps below zero: what is owed for a large batch

    def give(self, rows: int, size: int) -> None:
        """What `take` took has ended."""
        self.rows_now -= rows
        self.bytes_now -= size

    def _over(self, what: str, retry_after_s: float = 0.001, *, alone: bool = False) -> FrontError:
        """The error of a request that must wait; one that is over it `alone` will never be served."""
        return FrontError(
            Status.RESOURCE_EXHAUSTED,
            f"{self.whose} is over its quota: {what}{', and this request alone has more' if alone else ''}",
            retry_after_s=0.0 if alone else max(retry_after_s, 0.001),
        )


class Caller:
    """A token's name, quota, shared memory, and session, which begins with its first request."""

    def __init__(
        self,
        name: str,
        row: TokenRow,
        *,
        quota: Quota,
        regions: Regions,
        opened: Callable[[Caller], Session],
    ) -> None:
        self._name, self.quota, self.regions = name, quota, regions
        self._opened = opened
        self.limit(row)
        self._session: Session | None = None
        self.gone = False  # the file has its token no more

    def limit(self, row: TokenRow) -> None:
        """Take the limits of a row from now on; what is in flight stays."""
        self.row = row
        models = row.models or ()
        self._models = frozenset((*models, *map(canonical_model, models)))
        self.quota.limit(
            most_rows=row.in_flight or 0,
            most_bytes=_bytes(row.bytes_in_flight),
            per_s=row.requests_per_s or 0.0,
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = self._opened(self)
        return self._session

    def part(self) -> Session | None:
        """Give up the session, if it has begun: the next request has another."""
        parted, self._session = self._session, None
        return parted

    def check(self) -> None:
        """Raise FrontError, 401, if the token is gone: a shell may remember whom it was of."""
        if self.gone:
            raise FrontError(Status.UNAUTHENTICATED, f"the token is not known any more: {_REALM}")

    def may_use(self, model: str) -> bool:
        """Whether there is a model of this name (without its version) for the token."""
        return self.row.models is None or model in self._models

    def check_operator(self) -> None:
        """Raise FrontError, 403, if the token is not an operator's."""
        if not self.row.operator:
            raise FrontError(
                Status.PERMISSION_DENIED,
                f"token '{self._name}' may not load or unload models, or read metrics: operator = true "
                "lets a token",
            )


class Parted(NamedTuple):
    """What a token does not need any more, once what it has in flight has ended."""

    session: Session | None
    regions: Regions | None


class Callers:
    """Who may ask. Without a file of tokens everyone may, as one caller without a name.

    `opened` makes the session of a caller, and `regions` the shared memory of one.
    """

    def __init__(
        self,
        path: str,
        opened: Callable[[Caller], Session],
        regions: Callable[[], Regions] = Regions,
    ) -> None:
        self._path, self._opened, self._regions = path, opened, regions
        self._by_digest: dict[bytes, Caller] = {}
        self.everyone = self._caller("", TokenRow(operator=True), "the gateway")
        self.warning = ""
        if path:
            self.read()

    @property
    def open(self) -> bool:
        """Whether no token is needed."""
        return not self._path

    @property
    def all(self) -> list[Caller]:
        return [self.everyone] if self.open else [*self._by_digest.values()]

    def read(self) -> list[Parted]:
        """Read the file (again) and return what gets no more requests. Raises InvalidConfig."""
        before = {caller.name: caller for caller in self._by_digest.values()}
        rows, self.warning = read_tokens(Path(self._path))
        found: dict[bytes, Caller] = {}
        parted: list[Parted] = []
        for name, row in rows.items():
            caller = before.pop(name, None)
            if caller is None:
                caller = self._caller(name, row, f"token '{name}'")
            else:
                if caller.row.weight != row.weight:
                    parted.append(Parted(caller.part(), None))
                caller.limit(row)
            found[_digest_of(row)] = caller
        for caller in before.values():
            caller.gone = True
            parted.append(Parted(caller.part(), caller.regions))
        self._by_digest = found
        return parted

    def _caller(self, name: str, row: TokenRow, whose: str) -> Caller:
        return Caller(name, row, quota=Quota(whose), regions=self._regions(), opened=self._opened)

    def caller(self, authorization: str) -> Caller:
        """The caller with this Authorization header. Raises FrontError, 401."""
        if not self._path:
            return self.everyone
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise FrontError(Status.UNAUTHENTICATED, f"this gateway needs a token: {_REALM}")
        # The digest is looked up, and not the token: how long that takes says nothing about any token.
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogatepass")).digest()
        caller = self._by_digest.get(digest)
        if caller is None or not hmac.compare_digest(digest, _digest_of(caller.row)):
            raise FrontError(Status.UNAUTHENTICATED, f"the token is not known: {_REALM}")
        return caller


def _bytes(size: int | str | None) -> int:
    return parse_bytes(size) if isinstance(size, str) else size or 0


def _digest_of(row: TokenRow) -> bytes:
    if row.sha256:
        return bytes.fromhex(row.sha256)
    return hashlib.sha256(row.token.encode()).digest()


def read_tokens(path: Path) -> tuple[Mapping[str, TokenRow], str]:
    """The tokens of a file by name, and a warning in words if others can read them.

    Raises InvalidConfig.
    """
    _, document = read_toml(path, "the tokens")
    unknown = [key for key in document if key != "tokens"]
    tables = document.get("tokens")
    if unknown or not isinstance(tables, dict) or not tables:
        raise InvalidConfig(f"{path} has a table [tokens.NAME] for each token, and nothing else")
    if len(tables) > MOST_TOKENS:
        raise InvalidConfig(f"{path} has {len(tables):,} tokens; at most {MOST_TOKENS} are taken")
    found: dict[str, TokenRow] = {}
    digests: dict[bytes, str] = {}
    for name, table in tables.items():
        row = found[name] = _token_row(f"{path}: [tokens.{name[:64]}]", name, table)
        twin = digests.setdefault(_digest_of(row), name)
        if twin != name:
            raise InvalidConfig(f"{path}: {twin} and {name} have the same token")
    secret = any(row.token for row in found.values())
    warning = ""
    if secret and path.stat().st_mode & 0o077:
        warning = f"other users of this host can read the tokens; chmod 600 {path}"
    return found, warning


def _token_row(where: str, name: str, table: Any) -> TokenRow:
    if not _NAME.fullmatch(name):
        raise InvalidConfig(f"{where}: a name has up to 64 letters, digits, dots, - and _")
    try:
        row = msgspec.convert(table, TokenRow)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"{where}: {error}") from None
    if bool(row.token) == bool(row.sha256):
        raise InvalidConfig(f"{where} needs token or sha256, and not both")
    if row.token and not _TOKEN.fullmatch(row.token):
        raise InvalidConfig(
            f"{where}: a token has 8 to 512 printable characters of ASCII, and no spaces"
        )
    if row.sha256 and not _DIGEST.fullmatch(row.sha256):
        raise InvalidConfig(f"{where}: sha256 has 64 hexadecimal digits")
    for model in row.models or ():
        if name_and_version(model)[1]:
            raise InvalidConfig(f"{where}: models has names without versions, not {model[:200]!r}")
    if not all(map(math.isfinite, (row.weight, row.requests_per_s or 0.0))):
        raise InvalidConfig(f"{where}: weight and requests_per_s must be finite")
    try:
        size = _bytes(row.bytes_in_flight)
    except (InvalidDuration, InvalidConfig) as error:
        raise InvalidConfig(f"{where}: bytes_in_flight: {error}") from None
    if row.bytes_in_flight is not None and size < 1:
        raise InvalidConfig(f"{where}: bytes_in_flight must be at least 1")
    return row
