"""Questions made of region-text data."""
