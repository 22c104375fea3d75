"""Data sets: tasks, JSON lines, the hub, docstrings of the standard library."""
