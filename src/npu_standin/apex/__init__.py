"""Ascend's build of apex: no more of it than Megatron-LM imports. MindSpeed puts its own in the place of the rest."""
