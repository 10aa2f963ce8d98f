"""Tokenizers with few tokens and the properties that a test needs."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    *("", " ", "Hello, world!", "  two  spaces ", "\n\n\ttabs\n", "1234 5,678.90 20245", "it's they'll I'M"),
    *("Ünïcode 🙂 日本語 \u200d\ufeff", "def f(a, b):\n    return a + b  # 2024\n", "\r\n\x00\x07", "x" * 300),
    *("<|im_start|>user\nHi<|im_end|>\n", "a<|end|>  b<|en", "</s><s> <unk>", "ab|><|abend<|end|>x\n"),
    *("e\u0301 é ﬁ ①", "مرحبا שלום नमस्ते"),
]


def letters(count: int = 94) -> PreTrainedTokenizerFast:
    """Return a tokenizer with three special tokens (2 ends a text) and a token for each printable character."""
    words = ["<pad>", "<bos>", "<eos>", *map(chr, range(33, 126)), "Ġ"][: 3 + count]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes: characters may be split between tokens."""

    chat_template = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def __call__(self, text: str, add_special_tokens: bool = True):
        return type("Encoding", (), {"input_ids": list(text.encode())})


class Letters(Bytes):
    """A tokenizer whose every token is one character; token 2 is the end.

    All ids are below the tiny models' vocabulary.
    """

    eos_token_id = 2

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("!") + i) for i in ids if i != 2 or not skip_special_tokens)

    def __call__(self, text: str, add_special_tokens: bool = True, **how: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) - ord("!") for letter in text if letter != " "]})


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}<|assistant|>\n"


def special_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of characters with special tokens.

    Its merges join pairs of characters, or (kind "marked") a mark begins each text.
    """
    letters = [chr(c) for c in range(32, 127)] + ["\n", "é", "▁"]
    merges = [("a", "b"), ("|", ">"), ("<", "|"), ("e", "n"), ("en", "d")]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges), "?!"])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="?!"))
    if kind == "marked":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\n]+"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    right = kind == "greedy"  # tokens that take white space behind them along, or before them
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|end|>x")
    special = [AddedToken(name, special=True, normalized=False, rstrip=right, lstrip=kind == "eager") for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE
    return tokenizer
