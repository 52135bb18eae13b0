"""Procedural scenes: the stand-in for photographs that needs no network."""
