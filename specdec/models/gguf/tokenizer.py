"""Make the tokenizer of a GGUF file, with its chat template, from the file's metadata.

Byte-level tokenizers with a known rule for splitting text are built here. transformers converts all others. A test
compares both ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from specdec.base.errors import SpecDecError, errors_as
from specdec.models.gguf.file import GGUFFile, Strings
from specdec.models.quiet import quiet_transformers
from specdec.models.tokenizer import CONFIG, TEMPLATE, save

TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # field of the config -> name in a file
CONTROL = 3  # type of tokens that are not text
USER = 4  # type of tokens that are found before a text is split
# Values of tokenizer.ggml.pre that split off single digits before words. transformers splits words only, so a digit and
# the line break or space before it would become one token.
DIGITS_APART = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN, LLAMA = _REGEX.format(digits=""), _REGEX.format(digits="{1,3}")
SPLITS = {"qwen2": QWEN, "deepseek-r1-qwen": QWEN, "llama-bpe": LLAMA, "llama3": LLAMA, "smaug-bpe": LLAMA}
WORDS = {"default", "gpt-2", "olmo"}  # split as in GPT-2
WHOLE = {"llama-bpe", "llama3"}  # values for Llama 3: a word that is a token stays whole, and a text begins with BOS
# Model types whose tokenizers have the normalizer and the splits of Qwen, whatever a file says.
NORMALIZED = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"}
CONVERTED = {"qwen3_5_moe_text"}  # model types whose normalizer and splits only transformers knows
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BROKEN = "model '{}' has no usable tokenizer: that of its GGUF file is broken"
END = "<|endoftext|>"  # transformers' byte-level tokenizers always have it, if the vocabulary does


def write(name: str, file: GGUFFile, kind: str, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into ``folder``, in the format of transformers.

    The files are tokenizer.json, tokenizer_config.json and, if there is a template for chats, chat_template.jinja.
    name: the model's name in messages. file: the header of the GGUF file. kind: transformers' ``model_type``, as in the
    config.json that ``folder`` has already. Raises SpecDecError if the file has no usable tokenizer.
    """
    if (built := _read(name, file, kind)) is None:
        with quiet_transformers():
            from transformers import AutoTokenizer

            converted(name, file).save_pretrained(folder)
            theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)  # a model type may have normalisers
            save(theirs.backend_tokenizer, folder)
        return
    save(built, folder)
    named = {f"{part}_token": token for part, token in _named(file)}
    given = {"backend": "tokenizers", "model_max_length": int(1e30), "tokenizer_class": "TokenizersBackend"}
    (folder / CONFIG).write_text(json.dumps(given | named, indent=2) + "\n", "utf-8")
    if template := file.metadata.get("tokenizer.chat_template"):
        (folder / TEMPLATE).write_text(template, "utf-8")


def _read(name: str, file: GGUFFile, kind: str) -> Tokenizer | None:
    """Return the tokenizer of a GGUF file as an object of ``tokenizers``; None: only transformers can convert it.

    It is built here if it is byte-level BPE whose rule for splitting text is known.
    name: the model's name in messages. file: the header of the GGUF file. kind: transformers' ``model_type``, such as
    "qwen2". Raises SpecDecError for broken metadata.
    """
    metadata = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    template = file.metadata.get("tokenizer.chat_template", "")
    pre = metadata.get("pre", "default")
    known = pre in SPLITS or pre in DIGITS_APART or pre in WORDS or kind in NORMALIZED
    arrays = all(isinstance(metadata.get(key), Strings) for key in ("tokens", "merges"))
    if metadata.get("model") != "gpt2" or not known or kind in CONVERTED or not arrays or not isinstance(template, str):
        return None
    with errors_as(BROKEN.format(name), Exception):  # metadata are untrusted: any type
        return _build(file, metadata, pre, kind)


def _build(file: GGUFFile, metadata: dict[str, Any], pre: str, kind: str) -> Tokenizer:
    """Return the byte-level BPE tokenizer that the metadata of a GGUF file describe.

    file: the header of the GGUF file. metadata: its entries, with keys after "tokenizer.ggml."; "tokens" and "merges"
    are ``Strings``. pre: llama.cpp's name of the rule that splits text into words ("tokenizer.ggml.pre"). ``_read``
    passes only known rules; any other would split as GPT-2 does. kind: transformers' ``model_type``; for "qwen2", text
    is normalized and split as in Qwen, whatever ``pre`` says. Raises errors of any type for broken metadata.
    """
    tokens, alphabet = metadata["tokens"].texts, frozenset(BYTES.alphabet())
    types, named = metadata.get("token_type", ()), dict(_named(file))
    control, user = ([t for t, is_of in zip(tokens, types, strict=False) if is_of == kind] for kind in (CONTROL, USER))
    kept = {*control, *user, *named.values()}  # these are found as they are, before a text is spelled in bytes
    vocabulary = {t if t in kept or alphabet.issuperset(t) else _spelled(t): n for n, t in enumerate(tokens)}
    merges, whole = [tuple(merge.split(" ")) for merge in metadata["merges"].texts], pre in WHOLE
    how = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "ignore_merges": whole}
    bpe = models.BPE(vocabulary, merges, **how)
    tokenizer: Any = Tokenizer(bpe)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if kind in NORMALIZED else None
    split = QWEN if kind in NORMALIZED else SPLITS.get(pre)
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        split_digits(file, tokenizer)
    else:
        words = pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, BYTES])
    special = [*control, *(token for token in (END, *named.values()) if token in vocabulary)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])
    added = {"add_bos_token": whole} | metadata
    first, last = (named[part] if added.get(f"add_{part}_token") else None for part in ("bos", "eos"))
    tokenizer.post_processor = _around(tokenizer, first, last)
    return tokenizer


def _spelled(token: str) -> str:
    """Return a token's text in the alphabet of byte-level BPE, in which each character stands for one byte of UTF-8."""
    return "".join(text for text, _ in BYTES.pre_tokenize_str(token))


def _named(file: GGUFFile) -> Iterator[tuple[str, str | None]]:
    """Yield (name, text of the token) for the special tokens "bos", "eos", "unk" and "pad", in this order.

    file: the header of the GGUF file. The text is None if the file has no such token.
    """
    for part, key in TOKENS.items():
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        yield part, None if token is None else file.metadata["tokenizer.ggml.tokens"][token]


def _around(tokenizer: Any, first: str | None, last: str | None) -> Any:
    """Return a post-processor of ``tokenizers`` that adds special tokens to each encoded text.

    tokenizer: the ``tokenizers.Tokenizer`` that has the tokens; the caller sets its ``post_processor``. first: text of
    the token before a text; None: adds no token. last: text of the token after a text; None: adds no token.
    """
    single, second = (
        " ".join(f"{each}:{n}" for each in (first, text, last) if each is not None)
        for n, text in enumerate(("$A", "$B"))
    )
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last) if token is not None]
    return processors.TemplateProcessing(single=single, pair=f"{single} {second}", special_tokens=ids)


def converted(name: str, file: GGUFFile) -> Any:
    """Return the tokenizer, with its chat template, that transformers makes of the metadata of a GGUF file.

    It is a ``TokenizersBackend``. name: the model's name in messages. file: the header of the GGUF file. Raises
    SpecDecError if the file has no usable tokenizer.
    """
    from transformers import TokenizersBackend
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    metadata = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    metadata |= {key: value.texts for key, value in metadata.items() if isinstance(value, Strings)}
    own, options = (
        {field: metadata[key] for key, field in GGUF_TOKENIZER_MAPPING[part].items() if key in metadata}
        for part in ("tokenizer", "tokenizer_config")
    )
    if not isinstance(own.get("tokens"), list):
        raise SpecDecError(f"model '{name}' has no usable tokenizer: the GGUF file has no vocabulary")
    if own.get("tokenizer_type") == "llama":
        options.setdefault("add_bos_token", True)  # as llama.cpp does
    if own.get("tokenizer_type") == "gemma4":
        options["add_bos_token"] = False  # as in the original: chat templates write the token
    with errors_as(BROKEN.format(name), Exception):  # metadata are untrusted: any type
        options |= {f"{part}_token": token for part, token in _named(file)}
        backend, more = convert_gguf_tokenizer(file.architecture, own)
        split_digits(file, backend)
        return TokenizersBackend(tokenizer_object=backend, **options, **more)


def split_digits(file: GGUFFile, tokenizer: Tokenizer) -> None:
    """Make ``tokenizer`` split off single digits, in place, if the vocabulary in the GGUF file was trained so.

    transformers' converter does not do so. file: the header of the GGUF file, whose "tokenizer.ggml.pre" tells. For
    other vocabularies, ``tokenizer`` stays as it is.
    """
    kind, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and pre in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
