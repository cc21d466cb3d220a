"""`make plan`: what a recipe will take, before it is run: memory, data, time and disk. docs/plan.md has the sources."""
