"""Stage sft: both engines."""
