"""Adds the policy NEWEST, the workload waves and the device sums to slosched."""
