"""The PyTorch runtime: runs a model's layers as PyTorch functions over a KV cache, on any device, captured on CUDA."""
