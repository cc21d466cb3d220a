"""CANN's pyACL, which MindSpeed imports, but calls only for mixture of experts and adaptive recompute."""

from torch_npu._unsupported import Unsupported

__getattr__ = Unsupported("acl").__getattr__
