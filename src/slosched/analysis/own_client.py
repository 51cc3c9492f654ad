"""Which rows of a controller's request log are those of the client whose log lies beside it.

A controller logs the requests of every client, including those that do not belong to the sweep. The figures of
a run show the sweep alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slosched.telemetry.table import LogTable

#: Columns that `of_client` compares.
REQUEST_COLUMNS = frozenset({"t", "latency", "request_id", "model_id", "user_id"})
CLIENT_COLUMNS = frozenset({"scheduled_ns", "request_id", "model_id", "user_id"})

_Integers = NDArray[np.int64]


def of_client(requests: LogTable, client: LogTable) -> LogTable:
    """Return `requests` with the rows of `client` only, in the order in which they are.

    Rows belong together when their request, model and user ids do. Where another client used the same
    ids, the one that arrived nearest to the scheduled send is taken. If the client's log is empty, repeats a
    request id or shares no row with the requests (it is of another run), all rows stay.
    """
    ids = client["request_id"]
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    if not len(ids) or np.any(ordered[1:] == ordered[:-1]):
        return requests
    places = np.minimum(np.searchsorted(ordered, requests["request_id"]), len(ids) - 1)
    partner = order[places]
    same = ordered[places] == requests["request_id"]
    for name in ("model_id", "user_id"):
        same &= client[name][partner] == requests[name]
    rows = np.flatnonzero(same)
    if not len(rows):
        return requests
    arrival_ns: _Integers = requests["t"][rows] - requests["latency"][rows]
    apart_ns = np.abs(arrival_ns - client["scheduled_ns"][partner[rows]])
    nearest = np.lexsort((apart_ns, partner[rows]))
    partners = partner[rows][nearest]
    first = np.concatenate([[True], partners[1:] != partners[:-1]])
    rows = np.sort(rows[nearest[first]])
    if len(rows) == len(requests):
        return requests
    columns = {name: column[rows] for name, column in requests.columns.items()}
    return LogTable(requests.path, columns, requests.truncated)
