"""The recipe: every setting of a run, typed and checked."""
