"""Adapters as things with names: folder to model, model to folder, several beside one base."""
