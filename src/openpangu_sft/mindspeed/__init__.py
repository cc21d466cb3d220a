"""The mindspeed engine: MindSpeed-LLM's own training, told by the recipe what to do and watched while it does it."""
