"""gRPC's own health protocol, which Kubernetes' gRPC probes speak: grpc.health.v1.Health/Check.

Its two messages have one field each: the name of a service, which is not looked at (Triton has one service
too), and a number.
"""

from __future__ import annotations

from typing import Final

from slosched.fronts.rpc.calls import Call

HEALTH_SERVICE: Final = "grpc.health.v1.Health"
#: HealthCheckResponse.status: field 1 with SERVING, or NOT_SERVING.
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"


async def check(call: Call) -> bytes:
    """SERVING while the gateway is ready. Needs no token."""
    await call.request()
    return _SERVING if call.service.ready() else _NOT_SERVING
