"""Names that Megatron-LM imports; MindSpeed replaces FusedAdam by its own AdamW, which is npu_apply_adam_w."""

from torch_npu._companions import Unsupported

FusedAdam = Unsupported("apex.optimizers.FusedAdam")
FusedSGD = Unsupported("apex.optimizers.FusedSGD")
