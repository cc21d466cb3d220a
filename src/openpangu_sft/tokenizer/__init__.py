"""openPangu's conversation format and its tokenizer."""
