"""Self-contained pages and pictures of a run: they open from disk, ask the network for nothing and run no script."""
