"""The PyTorch runtime: every known family, on every device."""
