"""Where weights come from: the hub, GGUF files, the embedded catalogue, checkpoints and drafter folders."""
