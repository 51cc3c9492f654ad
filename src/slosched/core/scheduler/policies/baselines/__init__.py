"""Simpler schedulers to compare with."""
