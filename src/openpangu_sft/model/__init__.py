"""The model in transformers, its batches, and its FLOPs."""
