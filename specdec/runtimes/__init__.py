"""How a model is run: the target interface, its runtimes, adapters and offloaded experts."""
