"""Ways to describe a picture in words."""
