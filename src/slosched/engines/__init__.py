"""Engines that run the same decorated functions: inline, on Dask, and on slosched's own workers.

import slosched.engines

with slosched.engines.open("local", functions=["my_module"]) as engine:
    print(engine.call("my_function", 3).result())
"""

from slosched.engines.engine import Engine, Handle
from slosched.engines.opening import ENGINES, open

__all__ = ["ENGINES", "Engine", "Handle", "open"]
