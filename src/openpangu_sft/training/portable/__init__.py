"""The engine that needs no NPU: transformers on CPU or CUDA."""
