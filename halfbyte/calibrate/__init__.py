"""A better 4-bit base from a few rows of data: activation statistics, weighted scale search, a low-rank start on what is left over."""
