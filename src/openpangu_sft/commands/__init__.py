"""The commands of the command line, one per stage. Each imports what it runs when it runs."""
