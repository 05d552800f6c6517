"""A script per library, run by the interpreter of its own environment; ``shared`` is what they have in common."""
