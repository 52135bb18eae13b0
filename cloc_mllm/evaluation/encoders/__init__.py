"""Encoders: how they are read, and what they are measured on."""
