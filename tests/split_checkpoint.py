"""A Megatron checkpoint for any TP and PP, cut by hand from a transformers model: shares no code with `convert`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_files import hf_sizes
from openpangu_sft.recipe.sections import Model

State = dict[str, torch.Tensor]


def random_llama(model: Model) -> LlamaForCausalLM:
    """openPangu in transformers, fp32, with weights, biases and norms that are all different."""
    config = LlamaConfig(**hf_sizes(model), attention_bias=True, mlp_bias=False, attn_implementation="eager")
    llama = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.dim() == 2:
                parameter *= 1 if "embed_tokens" in name else parameter.shape[1] ** -0.5
            elif "norm" in name:
                parameter /= 4
                parameter += 1
    return llama


def write_split(
    llama: LlamaForCausalLM, model: Model, directory: Path, tensor: int, layers: Sequence[int], padded_vocab: int
) -> Path:
    """Writes mp_rank_… below an iteration's directory and returns it.

    Args:
        llama: weights, in the dtype to be written.
        tensor: TP.
        layers: of each of the PP stages.
        padded_vocab: rows of the embedding; those beyond the vocabulary are noise.
    """
    pipeline = len(layers)
    args = arguments(model, padded_vocab, tensor, pipeline)
    if len(set(layers)) > 1:
        args.num_layer_list = ",".join(map(str, layers))
    for stage in range(pipeline):
        for rank in range(tensor):
            own = range(sum(layers[:stage]), sum(layers[: stage + 1]))
            state = rank_state(llama.state_dict(), model, tensor, rank, own, padded_vocab)
            name = f"mp_rank_{rank:02d}" if pipeline == 1 else f"mp_rank_{rank:02d}_{stage:03d}"
            (directory / name).mkdir(parents=True)
            content = {"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": state}
            torch.save(content, directory / name / "model_optim_rng.pt")
    return directory


def arguments(model: Model, padded_vocab: int, tensor: int, pipeline: int) -> Namespace:
    """The part of Megatron's saved arguments that describes the model."""
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        max_position_embeddings=model.max_position_embeddings,
        padded_vocab_size=padded_vocab,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        normalization="RMSNorm",
        norm_epsilon=model.norm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=True,
        add_dense_bias=True,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        num_layer_list=None,
    )


def rank_state(hf: State, model: Model, tensor: int, rank: int, layers: range, padded_vocab: int) -> dict[str, Any]:
    """State dict of one rank.

    Args:
        hf: the whole model, by Hugging Face name.
        rank: among the `tensor` ranks of a stage.
        layers: of the stage.
    """

    def rows(whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(tensor, 0)[rank]

    def columns(whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(tensor, 1)[rank]

    def vocabulary(whole: torch.Tensor) -> torch.Tensor:
        noise = torch.full((padded_vocab - model.vocab_size, model.hidden_size), 7, dtype=whole.dtype)
        return rows(torch.cat([whole, noise]))

    def groups(whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(model.num_query_groups, -1, *whole.shape[1:])

    first, last = layers.start == 0, layers.stop == model.num_layers
    state: dict[str, Any] = {}
    if first:
        state["embedding.word_embeddings.weight"] = vocabulary(hf["model.embed_tokens.weight"])
    for layer in layers:
        there, here = f"model.layers.{layer}.", f"decoder.layers.{layer - layers.start}."
        state[here + "input_layernorm.weight"] = hf[there + "input_layernorm.weight"]
        for kind in ("weight", "bias"):
            parts = [groups(hf[f"{there}self_attn.{part}_proj.{kind}"]) for part in "qkv"]  # [groups, rows, …]
            state[here + f"self_attention.linear_qkv.{kind}"] = rows(torch.cat(parts, 1)).flatten(0, 1)
        state[here + "self_attention.linear_proj.weight"] = columns(hf[there + "self_attn.o_proj.weight"])
        state[here + "self_attention.linear_proj.bias"] = hf[there + "self_attn.o_proj.bias"]
        state[here + "pre_mlp_layernorm.weight"] = hf[there + "post_attention_layernorm.weight"]
        gate, up = (rows(hf[f"{there}mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        state[here + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        state[here + "mlp.linear_fc2.weight"] = columns(hf[there + "mlp.down_proj.weight"])
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            state[here + linear + "._extra_state"] = None
    if last:
        state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not (first and model.tie_word_embeddings):  # tied weights are stored twice where the stages differ
            state["output_layer.weight"] = vocabulary(hf["lm_head.weight"])
        state["output_layer._extra_state"] = None
    return {name: value if value is None else value.clone() for name, value in state.items()}
