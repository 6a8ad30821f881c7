"""The low-rank layer: wrap, start, find, inject, collect, merge.  Knows neither files nor transformers."""
