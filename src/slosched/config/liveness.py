"""How often peers say that they are there, and when their silence means that they are lost."""

from __future__ import annotations

from slosched.units import NS_PER_MS

#: The worker's heartbeat (design; issue of the serving core) and when silence means loss.
HEARTBEAT_NS = 200 * NS_PER_MS
LOST_AFTER_NS = 800 * NS_PER_MS
CLIENT_HEARTBEAT_NS = 1_000 * NS_PER_MS
CLIENT_LOST_AFTER_NS = 5_000 * NS_PER_MS
