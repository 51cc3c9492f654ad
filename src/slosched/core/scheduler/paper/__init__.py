"""The parts of the published INFER5, kept apart from ours. Constants and defects as published."""
