"""Files to batches: rows, samples, chat templates, labels, packing.  Knows tokenizers, not models.

Nothing is imported here, so that the template worker (a small process of its own) starts without torch and transformers.
"""
