"""What training will see: numbers over the dataset and its samples, token by token."""
