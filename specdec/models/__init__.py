"""Find, download, read and identify models, adapters and trained drafters: Hugging Face, GGUF and safetensors files."""
