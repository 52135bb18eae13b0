"""Tests that start no process, in the order of the package."""
