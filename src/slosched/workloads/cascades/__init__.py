"""The cascades that come with the package, and those of a person's own: TOML files that describe one each."""

from slosched.workloads.cascades.scores import read_scores
from slosched.workloads.cascades.spec_files import builtin_cascades, is_cascade_path, load_cascade

__all__ = ["builtin_cascades", "is_cascade_path", "load_cascade", "read_scores"]
