"""Ways to find in a caption what a detector could look for."""
