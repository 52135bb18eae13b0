"""Schemas, readers, builders and checks for region-text and conversation data."""
