"""Supervised fine-tuning: what both engines share, and the portable engine."""
