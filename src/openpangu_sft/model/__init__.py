"""The model in transformers, and what is fed to it."""
