"""Faults from outside: kills, damaged files, malformed calls, many threads. ``python -m tests.faults --all``."""
