"""Whether this machine has what a recipe needs: one finding for each check, with the remedy."""
