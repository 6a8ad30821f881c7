"""Bytes on disk to named tensors and back: each format once, read and write.

Foreign key names live here and nowhere else.
"""
