"""Models that run eagerly, as in the published sharing experiments, with boundaries between their modules."""
