"""An OpenAI-compatible endpoint on any machine."""
