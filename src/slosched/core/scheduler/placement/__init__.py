"""Which weights go to which GPU: the mechanics, and our rules (policies/placements.py lists all)."""
