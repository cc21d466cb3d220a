"""Ascend's build of apex: only what Megatron-LM imports. MindSpeed replaces the rest."""
