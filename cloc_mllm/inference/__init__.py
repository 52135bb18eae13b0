"""Answers from a trained checkpoint."""
