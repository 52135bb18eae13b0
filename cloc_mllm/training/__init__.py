"""What the three training programs share."""
