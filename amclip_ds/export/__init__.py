"""Weights for other libraries: each export is loaded back through its library and kept only if it computes the same."""
