"""What MindSpeed imports of torch_npu.utils."""

from torch_npu._unsupported import Unsupported

from . import collect_env, flops_count

__all__ = ["collect_env", "flops_count", "register_asd_hook"]

# looks for silent data corruption; asked for with NPU_ASD_ENABLE
register_asd_hook = Unsupported("torch_npu.utils.register_asd_hook")
