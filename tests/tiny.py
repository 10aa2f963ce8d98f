"""A tiny random model folder with a character tokenizer and a chat template, as a user would have it on disk."""

from __future__ import annotations

import string
from pathlib import Path

from conftest import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_tiny(folder: Path, context: int = 4096, **sizes: int) -> Path:
    """Write a float32 llama whose every token is one character, without special ones: it generates up to the limit."""
    return _save(folder, "llama", {"max_position_embeddings": context, **sizes})


def save_tiny_moe(folder: Path, kind: str = "mixtral") -> Path:
    """The same as a mixture of 6 experts, of which a token takes 2."""
    count = "num_local_experts" if kind == "mixtral" else "num_experts"
    return _save(folder, kind, {count: 6, "num_experts_per_tok": 2})


def _save(folder: Path, kind: str, more: dict[str, object]) -> Path:
    characters = string.printable.replace("\r", "")
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    size = {"vocab_size": len(characters), **more}
    tiny_model(kind, eos_token_id=None, bos_token_id=None, **size).save_pretrained(folder)
    return folder
