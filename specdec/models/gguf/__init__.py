"""Read GGUF files: their headers, weights in quantization blocks, tokenizers, and the models made of them."""
