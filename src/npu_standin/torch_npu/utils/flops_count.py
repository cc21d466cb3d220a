"""Counting of operations, which MindSpeed asks for when it searches for a layout by itself."""

from torch_npu._unsupported import Unsupported

FlopsCounter = Unsupported("torch_npu.utils.flops_count.FlopsCounter")
