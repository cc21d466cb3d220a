"""FLOPs counter, which MindSpeed uses when it searches for a parallel layout."""

from torch_npu._unsupported import Unsupported

FlopsCounter = Unsupported("torch_npu.utils.flops_count.FlopsCounter")
