"""Processes that run code of others, started by forks of one that runs none, and what is said between them."""
