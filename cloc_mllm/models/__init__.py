"""What a checkpoint carries: configurations, modeling, processing, box geometry."""
