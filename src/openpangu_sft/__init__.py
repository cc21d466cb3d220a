"""Fine-tune openPangu-Embedded on your own conversations, on Ascend NPUs or on a machine without any."""

__version__ = "0.5.0"
