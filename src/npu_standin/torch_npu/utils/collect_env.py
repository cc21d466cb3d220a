"""Versions of what is installed."""


def get_cann_version() -> str:
    """The version that torch_npu 2.1.0.post8 pairs with."""
    return "8.0.RC3"
