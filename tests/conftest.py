"""What every test run begins with."""

from __future__ import annotations

import signal

# A shell that runs `make check &` in a script lets its children ignore Ctrl-C, and their children inherit that:
# the tests which send SIGINT would wait for an end that cannot come. A handler, however, is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
