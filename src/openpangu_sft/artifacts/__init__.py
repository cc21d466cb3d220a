"""Directories that are complete or absent, with a manifest."""
