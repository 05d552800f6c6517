"""Tests of README.md and of the documentation."""
