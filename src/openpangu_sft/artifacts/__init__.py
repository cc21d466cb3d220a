"""Directories that are complete or absent, each with a manifest."""
