"""Held-out loss and scores of generated text."""
