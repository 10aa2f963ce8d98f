"""GGUF: files and their headers, weights in blocks, and the models made of them."""
