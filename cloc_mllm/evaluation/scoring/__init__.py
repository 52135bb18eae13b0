"""From answers, boxes and similarities to hits, and from hits to metrics with intervals."""
