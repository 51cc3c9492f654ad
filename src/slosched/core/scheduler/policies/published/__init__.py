"""Replicas of published schedulers: Clockwork's TYPEs and the rule by which it places weights."""
