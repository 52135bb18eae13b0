"""VESL: region-text labels for bare images, by captioning, phrase extraction and open-vocabulary detection."""
