"""Low-bit weights: codebooks, quantization states, layers that keep their weight packed, and the way back to dense."""
