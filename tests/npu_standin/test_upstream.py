"""Upstream's own calls of fused operators reach the stand-in as they are, and give what upstream's plain code gives.

Runs where its sources are at hand (upstream.py).
"""

from __future__ import annotations

from pathlib import Path

from upstream import run_upstream

PROGRAM = """
import math
from argparse import Namespace
from mindspeed_llm import megatron_adaptor
import torch
from torch.testing import assert_close
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.legacy.model.rms_norm import RMSNorm
from megatron.training import global_vars
from mindspeed.core.fusions.fused_bias_swiglu import SwiGLUFunction
from mindspeed.optimizer.adamw import AdamW
from mindspeed.utils import set_actual_seq_len
from mindspeed_llm.core.models.common.embeddings.rotary_pos_embedding import apply_rotary_pos_emb
from mindspeed_llm.core.transformer.dot_product_attention import flash_attention_forward
from mindspeed_llm.legacy.model.rms_norm import rms_norm_forward
from mindspeed_llm.training.utils import compute_actual_seq_len

class Settings(Namespace):
    def __getattr__(self, name):
        return None  # every flag that is not set

settings = Settings(context_parallel_size=1, shape_order="TND", pre_tockens=65536, next_tockens=0, sparse_mode=0)
global_vars.set_args(settings)
torch.manual_seed(1)

def compare(fused, plain, *inputs):
    assert_close(fused, plain)
    weights = torch.randn_like(plain)
    for got, wanted in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (fused, plain))):
        assert_close(got, wanted, rtol=1e-4, atol=1e-6)

x = torch.randn(5, 1, 4, 8, requires_grad=True)
norm = RMSNorm(8, eps=1e-5)
norm.weight.data.normal_()
norm.add_rmsnorm_offset = False
results = []
for norm.use_fused_rmsnorm in (True, False):
    results.append(rms_norm_forward(norm, x))
compare(*results, x, norm.weight)

compare(SwiGLUFunction.apply(x, False), swiglu(x), x)

freqs = torch.randn(5, 1, 1, 4).repeat(1, 1, 1, 2)
results = []
for settings.use_fused_rotary_pos_emb in (True, False):
    results.append(apply_rotary_pos_emb(x, freqs))
compare(*results, x)

positions = torch.tensor([0, 1, 0, 1, 2])
set_actual_seq_len(compute_actual_seq_len(positions))
key, value = (torch.randn(5, 1, 2, 8, requires_grad=True) for _ in range(2))
core = Namespace(
    hidden_size_per_attention_head=8, scale_mask_softmax=Namespace(scale=None), pse=None, pse_type=None, alibi=None,
    attention_dropout=torch.nn.Dropout(0.0),
)
fused = flash_attention_forward(core, x, key, value, None, None, None)
parts = []
for part in (slice(0, 2), slice(2, 5)):
    q, k, v = (t[part].permute(1, 2, 0, 3) for t in (x, key, value))
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / math.sqrt(8)
    hidden = torch.ones(scores.shape[2:]).triu(1).bool()
    p = scores.masked_fill(hidden, -math.inf).softmax(-1)
    parts.append((p @ v.repeat_interleave(2, 1)).permute(2, 0, 1, 3).flatten(2))
compare(fused, torch.cat(parts), x, key, value)

ours, torchs = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
flags = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
optimizers = [AdamW([ours], **flags), torch.optim.AdamW([torchs], **flags)]
for _ in range(5):
    ours.grad = torch.randn(3, 2)
    torchs.grad = ours.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
assert_close(ours.data, torchs.data)
print("all alike")
"""


def test_its_fused_operators_are_its_plain_ones(upstream: Path, tmp_path: Path) -> None:
    (tmp_path / "operators.py").write_text(PROGRAM, "utf-8")
    assert run_upstream(upstream, str(tmp_path / "operators.py")).splitlines()[-1] == "all alike"
