"""Errors, console, HTML pages, JSON lines, signals, git, Ascend version files."""
