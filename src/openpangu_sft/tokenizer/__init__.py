"""openPangu's chat template and its tokenizer."""
