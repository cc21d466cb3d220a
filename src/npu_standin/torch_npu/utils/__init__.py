"""The part of torch_npu.utils that MindSpeed imports."""

from torch_npu._unsupported import Unsupported

from . import collect_env, flops_count

__all__ = ["collect_env", "flops_count", "register_asd_hook"]

# detects silent data corruption; enabled with NPU_ASD_ENABLE
register_asd_hook = Unsupported("torch_npu.utils.register_asd_hook")
