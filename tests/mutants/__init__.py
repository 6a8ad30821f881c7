"""Deliberate bugs, by unit; see run.py."""
