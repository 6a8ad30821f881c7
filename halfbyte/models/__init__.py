"""Hugging Face models made ready: found, checked, loaded into few bits, saved, and asked for text."""
