"""The tests: the specification in `spec`, then one folder per room of the package."""
