"""Importing this makes torch.cuda another name of torch.npu, and the backend nccl one of hccl, as the real one does."""

from torch_npu import _collectives, _devices, npu

_devices.transfer(npu)
_collectives.transfer()
