"""Hugging Face and Megatron-core checkpoints of one model, and the way between them."""
