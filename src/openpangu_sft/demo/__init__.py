"""`make demo` and `make smoke`: a small model, and the stages in order."""
