"""Data: index, order, reading, views, captions. Knows nothing of DeepSpeed or ranks; rank and world come as numbers."""
