"""The demo: the whole path once, every stage through the real launcher, ending in one report a person can read."""
