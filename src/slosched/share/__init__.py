"""Experiments with models that share one GPU: specs, runs in processes and in virtual time, results."""
