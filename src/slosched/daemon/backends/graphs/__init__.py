"""The serving lane for members of sharing experiments: models as CUDA graphs (lane.py)."""
