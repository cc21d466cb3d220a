"""Samples to a packed dataset in Megatron's indexed format."""
