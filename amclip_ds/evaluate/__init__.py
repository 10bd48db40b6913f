"""What a model can do: zero-shot classification, retrieval, linear probe and k-NN, in CLIP_benchmark's words.

datasets.py reads the folders, encoder.py runs a model over them with all ranks sharing the work, metrics.py counts.
"""
