"""The directory of a training run, the same for both engines."""
