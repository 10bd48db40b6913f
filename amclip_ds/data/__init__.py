"""One sample (views, captions, photometric changes) and the stream of them (order, chunks, workers, loader, prefetch).

Knows nothing of DeepSpeed or ranks; rank and world come as numbers. Files are opened in shards/."""
