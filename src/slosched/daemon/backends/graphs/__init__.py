"""The serving lane for members of sharing experiments: models as CUDA graphs (lane.py).

Importing this imports neither torch nor a library of models.
"""

from slosched.daemon.backends.graphs.names import can_capture

__all__ = ["can_capture"]
