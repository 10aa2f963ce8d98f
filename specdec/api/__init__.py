"""The Python API: load a model and a drafter, then generate, stream and generate in batches."""
