"""Changes of one place in the library's code, each of which a test must notice: ``python -m tests.mutation``."""
