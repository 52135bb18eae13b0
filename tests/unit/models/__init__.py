"""Tests of what a checkpoint carries."""
