"""`make evaluate`: validation loss and answers, before and after training."""
