"""How a model is run: the target interface, its runtimes, the KV cache, adapters and offloaded experts."""
