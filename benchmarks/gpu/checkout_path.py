"""Imported first by the programs of this folder: this checkout, its benchmarks and this folder can be imported.

Also by the processes that they start (PYTHONPATH).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
_SRC = HERE.parent.parent / "src"

for _place in (HERE.parent, HERE, _SRC):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))
os.environ["PYTHONPATH"] = os.pathsep.join(
    dict.fromkeys(
        [str(_SRC), str(HERE.parent), str(HERE), *filter(None, [os.getenv("PYTHONPATH")])]
    )
)
