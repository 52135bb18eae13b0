"""Command line, chat and demo."""
