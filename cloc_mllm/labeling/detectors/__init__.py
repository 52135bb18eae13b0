"""Ways to find phrases in pictures."""
