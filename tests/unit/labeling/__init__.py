"""Tests of VESL: captions, phrases, detections, filters."""
