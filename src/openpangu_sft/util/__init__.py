"""Errors, console, HTML pages, JSON lines, signals, git, Ascend versions and visible NPUs."""
