"""Has transfer_to_npu."""
