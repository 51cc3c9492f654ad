"""The CPU as a device: a process for each model, so that code of others harms itself alone."""
