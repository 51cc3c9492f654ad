"""The traceback of an unexpected error goes into a file: no traceback reaches a user."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

#: What a process exits with after such an error.
INTERNAL_ERROR = 70


def keep_traceback() -> str:
    """Write the traceback of the current exception to a file and say where."""
    try:
        handle, name = tempfile.mkstemp(prefix="slosched-error-", suffix=".txt")
        os.close(handle)
        Path(name).write_text(
            f"{sys.argv}\n{sys.version}\n\n{traceback.format_exc()}", encoding="utf-8"
        )
    except OSError as error:
        return f"its traceback could not be kept ({error.strerror})"
    return f"please report it with the traceback in {name}"
