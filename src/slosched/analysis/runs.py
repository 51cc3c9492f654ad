"""A run as its files describe it: the logs, the manifest, and what to call it in a figure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.own_client import CLIENT_COLUMNS, REQUEST_COLUMNS, of_client
from slosched.errors import InvalidConfig
from slosched.telemetry import action_log, client_log, request_log
from slosched.telemetry.manifest import read_manifest
from slosched.telemetry.run_dir import CLIENT_MANIFEST, MANIFEST
from slosched.telemetry.table import LogTable

#: Where a run may keep a side's files: in the run directory itself, or in a folder of that side.
_FOLDERS = ("", "controller", "client")

#: Who kept a log.
SIDES = ("controller", "client")
#: Columns of a whole log that `read_rows` has in memory at once.
_AT_ONCE = 4

_PUBLISHED_NAME = re.compile(r"rate=(\d+(?:\.\d+)?)_num-models=(\d+)")


@dataclass(frozen=True)
class Run:
    """One run directory. At least one of the two logs is there, unless it was not to be read.

    `copies` and `rate` are N and R (requests per second over all copies) of the sweep: from the
    client's manifest where there is one, else counted in the logs. `stated` says that they were not
    counted.
    """

    path: Path
    requests: LogTable | None
    client: LogTable | None
    copies: int
    rate: float
    stated: bool
    partial: bool
    #: The client's own verdict on a sweep that does not count, in words; else "".
    invalid: str = ""

    @property
    def label(self) -> str:
        """ "N=12, R=600"; "R≈598" where R was measured; "(partial)" where the sweep was cut short,
        "(INVALID)" where the client's sends were late."""
        rate = f"R={self.rate:g}" if self.stated else f"R≈{self.rate:g}"
        marks = (" (partial)" if self.partial else "") + (" (INVALID)" if self.invalid else "")
        return f"N={self.copies}, {rate}{marks}"


def open_run(
    path: Path, *, only: Collection[str] | None = None, sides: Collection[str] = SIDES
) -> Run:
    """Read the logs of a run directory, or one request log by its file name.

    If the directory has both logs, `requests` are those of that client alone. With `only` nothing but the
    columns of these names (and those by which the two logs are compared) is read, in either log;
    "model_id", and the times of the requests, have to be among them. A log whose side is not in `sides` is
    left alone. Raises InvalidConfig if there is no such run, MalformedLog if a file of it is damaged.
    """
    manifests: list[Mapping[str, Any]] = []
    requests_at: Path | None = None
    client_at: Path | None = None
    if path.is_file():
        requests_at = path
    else:
        requests_at = find_log(path, request_log.FILE_NAME)
        client_at = find_log(path, client_log.FILE_NAME)
        manifests = list(_manifests(path))
    if requests_at is None and client_at is None:
        what = "does not exist" if not path.exists() else "holds no run"
        raise InvalidConfig(
            f"{path} {what}: expected {request_log.FILE_NAME} or {client_log.FILE_NAME} in it"
        )
    requests = client = None
    if requests_at is not None and "controller" in sides:
        requests = _own_requests(requests_at, client_at, only)
    if client_at is not None and "client" in sides:
        client = client_log.read_client_log(client_at, only=only)
    copies, rate = _stated(path, manifests)
    stated = copies is not None and rate is not None
    if copies is None or rate is None:
        copies, rate = _counted(requests, client)
    partial = any(
        str(m.get("kind", "")).startswith("client") and not m.get("complete", True)
        for m in manifests
    )
    return Run(
        path=path,
        requests=requests,
        client=client,
        copies=copies,
        rate=rate,
        stated=stated,
        partial=partial,
        invalid=invalid_verdict(path),
    )


def invalid_verdict(path: Path) -> str:
    """What the client's manifest says if its sweep does not count; else ""."""
    for document in _manifests(path):
        outcome = document.get("outcome")
        if isinstance(outcome, Mapping) and outcome.get("valid") is False:
            return str(outcome.get("verdict", "INVALID"))
    return ""


def labels(runs: Sequence[Run]) -> list[str]:
    """Return one label for each run; runs of the same label get their directories' names as well."""
    plain = [run.label for run in runs]
    return [
        label if plain.count(label) == 1 else f"{label} · {name}"
        for label, name in zip(plain, distinct_names([run.path for run in runs]), strict=True)
    ]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each run directory: its own, with as many parent folders as make all distinct."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max((len(each) for each in parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names if parts else []


def read_requests(
    path: Path, *, only: Collection[str] | None = None, everyone: bool = False
) -> LogTable:
    """Return the request log of a run directory, or the one at `path` itself, which holds rows.

    If the directory has a client's log, these are that client's requests alone, unless `everyone`'s are
    asked for. Raises InvalidConfig if there is none or it is empty, MalformedLog if it is damaged.
    """
    if path.is_file():
        return _not_empty(request_log.read_request_log(path, only=only), "requests")
    at = _log(path, request_log.FILE_NAME)
    client_at = None if everyone else find_log(path, client_log.FILE_NAME)
    return _not_empty(_own_requests(at, client_at, only), "requests")


def _own_requests(at: Path, client_at: Path | None, only: Collection[str] | None) -> LogTable:
    """The request log at `at`, without other clients' requests where this client's log is there."""
    if client_at is None:
        return request_log.read_request_log(at, only=only)
    wanted = None if only is None else REQUEST_COLUMNS.union(only)
    requests = request_log.read_request_log(at, only=wanted)
    return of_client(requests, client_log.read_client_log(client_at, only=CLIENT_COLUMNS))


def read_actions(path: Path, *, only: Collection[str] | None = None) -> LogTable:
    """Return the action log of a run directory. Raises as `read_requests` does."""
    at = _log(path, action_log.FILE_NAME)
    return _not_empty(action_log.read_action_log(at, only=only), "actions")


def read_rows(
    path: Path, rows: NDArray[np.intp], names: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """Return the columns `names` of the action log, but for these `rows` only.

    The log is read piece by piece, so that few of its columns are in memory at a time. Raises as
    `read_actions` does.
    """
    taken: dict[str, NDArray[np.int64]] = {}
    for first in range(0, len(names), _AT_ONCE):
        columns = read_actions(path, only=names[first : first + _AT_ONCE]).columns
        taken |= {name: column[rows] for name, column in columns.items()}
    return taken


def _log(path: Path, name: str) -> Path:
    at = find_log(path, name)
    if at is None:
        what = "does not exist" if not path.exists() else f"has no {name}"
        raise InvalidConfig(f"{path} {what}; it is one of the controller's logs, and needed here")
    return at


def _not_empty(log: LogTable, what: str) -> LogTable:
    if len(log) == 0:
        raise InvalidConfig(f"nothing to show: {log.path} holds no {what} yet")
    return log


def stated(path: Path, *names: str) -> Any:
    """Return the value of the first of `names` that the run's manifests contain; else None."""
    sections = [s for document in _manifests(path) for s in _sections(document)]
    for name in names:
        for section in sections:
            if section.get(name) is not None:
                return section[name]
    return None


def policy_of(path: Path) -> str:
    """The scheduler that the run's manifest names: "INFER5", "INFER5 (paper)"; "" if none does."""
    policy = stated(path, "policy")
    fidelity = stated(path, "fidelity")
    if not isinstance(policy, str):
        return ""
    return policy if fidelity in (None, "best") else f"{policy} ({fidelity})"


def find_log(path: Path, name: str) -> Path | None:
    """Where a run directory keeps the file `name`; None if it does not."""
    for folder in _FOLDERS:
        candidate = path / folder / name
        if candidate.is_file():
            return candidate
    return None


def manifests_of(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """Return the manifests of a run directory, the client's first; {} for one that cannot be read."""
    places = [
        (path / folder / name, read_manifest(path / folder, name=name))
        for folder in _FOLDERS
        for name in (CLIENT_MANIFEST, MANIFEST)
    ]
    return [(place, document) for place, document in places if document or place.is_file()]


def _manifests(path: Path) -> Iterator[Mapping[str, Any]]:
    return (document for _, document in manifests_of(path) if document)


def _stated(path: Path, manifests: Sequence[Mapping[str, Any]]) -> tuple[int | None, float | None]:
    published = _PUBLISHED_NAME.search(path.name)
    if published:
        return int(published.group(2)), float(published.group(1))
    for document in manifests:
        for section in _sections(document):
            copies, rate = section.get("copies"), section.get("rate")
            if isinstance(copies, int) and isinstance(rate, int | float):
                return copies, float(rate)
    return None, None


def _sections(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield document
    for value in document.values():
        if isinstance(value, Mapping):
            yield from _sections(value)


def _counted(requests: LogTable | None, client: LogTable | None) -> tuple[int, float]:
    table = requests if requests is not None else client
    if table is None or len(table) == 0:
        return 0, 0.0
    times = table["t"] - table["latency"] if requests is not None else table["scheduled_ns"]
    seconds = float(times.max() - times.min()) / 1e9
    copies = len(set(table["model_id"].tolist()))
    return copies, _rounded((len(table) - 1) / seconds) if seconds > 0 else 0.0


def _rounded(rate: float) -> float:
    """Two digits where they are within a hundredth of what was counted, else three: R≈600, R≈617."""
    two = float(f"{rate:.2g}")
    return two if abs(two - rate) <= 0.01 * rate else float(f"{rate:.3g}")
