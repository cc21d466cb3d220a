"""`make report`: one page about a run, or about two side by side, that needs nothing else to be read."""
