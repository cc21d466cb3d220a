"""Compares two checkpoints: tensor by tensor, and by logits."""
