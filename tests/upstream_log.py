"""Lines of MindSpeed-LLM's output."""

ITERATION = (
    " [2026-11-25 18:31:01] iteration       12/      60 | consumed samples:           48 | elapsed time per iteration "
    "(ms): 715.5 | learning rate: 1.000000E-04 | global batch size:     4 | lm loss: 5.590752E+00 | loss scale: 1.0 | "
    "grad norm: 1.683 | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
)

FULL_DEVICE = (
    "RuntimeError: NPU out of memory. Tried to allocate 5.03 GiB (NPU 3; 60.96 GiB total capacity; 49.47 GiB already "
    "allocated; 49.47 GiB current active; 1.32 GiB free; 57.55 GiB reserved in total by PyTorch) If reserved memory is "
    ">> allocated memory try setting max_split_size_mb to avoid fragmentation.\n"
)
"""torch_npu's, as in https://github.com/xingchensong/TouchNet/issues/100."""
