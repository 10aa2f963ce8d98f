"""How a model is run: the target interface, its runtimes and adapters."""
