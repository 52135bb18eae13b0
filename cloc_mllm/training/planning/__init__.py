"""What a run will take before it starts: operations, memory, traffic, and the words for them."""
