"""Where a trained model goes: one file for each destination."""
