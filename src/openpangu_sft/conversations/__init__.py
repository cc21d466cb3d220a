"""Raw conversations in common formats, converted to one typed sample."""
