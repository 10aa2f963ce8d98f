"""Read and use the tokenizer of a folder with a tokenizer.json, through the library ``tokenizers`` alone.

Token ids and chats equal those of transformers' ``AutoTokenizer``; a test compares them. The tokenizer of transformers
is loaded only for an attribute or an argument that is missing here.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

CONFIG, FILE, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
# Keyword arguments of ``__call__`` that need no transformers. ``verbose``, which warns of long texts, has no effect.
ARGUMENTS = {"add_special_tokens", "split_special_tokens", "verbose"}
NAMED = "unk_token", "bos_token", "eos_token", "sep_token", "pad_token", "cls_token", "mask_token"


def save(backend: Backend, folder: Path) -> None:
    """Write a tokenizer of the library ``tokenizers`` to the tokenizer.json in ``folder``.

    The merges of a BPE model are written as texts "LEFT RIGHT", which ``tokenizers`` reads in half the time that pairs
    take. They are written as pairs if a text would be read otherwise: because a token has a space, or the text begins
    with "#version", as a comment does.
    """
    content = json.loads(backend.to_str())
    merges = [" ".join(pair) for pair in content["model"].get("merges", ())]
    if merges and all(merge.count(" ") == 1 and not merge.startswith("#version") for merge in merges):
        content["model"]["merges"] = merges
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), "utf-8")


@dataclass
class Encoding:
    """The result of calling a ``Tokenizer``, with the interface of transformers' ``BatchEncoding``.

    input_ids: the token ids of a text; for a list of texts, a list of token ids for each.
    """

    input_ids: list[Any]

    def __getitem__(self, name: str) -> Any:
        if name not in ("input_ids", "attention_mask"):
            raise KeyError(name)
        return getattr(self, name)

    @property
    def attention_mask(self) -> list[Any]:
        return [[1] * len(each) if isinstance(each, list) else 1 for each in self.input_ids]


class Tokenizer:
    """A tokenizer with the interface of transformers' fast tokenizers.

    A method or an attribute that is missing here is that of transformers' tokenizer, which is loaded for it.

    folder: has tokenizer.json and tokenizer_config.json.
    backend_tokenizer: the tokenizer as an object of the library ``tokenizers``.
    chat_template: the Jinja template as text; None: there is none.
    name_or_path: the folder's path.
    digest: SHA-256 of tokenizer.json, 64 hex digits.
    bos_token, bos_token_id, eos_token, ...: the special tokens as text, and their ids; None: there is no such token.
    clean_up_tokenization_spaces: False: decoding removes no spaces.
    """

    clean_up_tokenization_spaces = False

    def __init__(self, folder: Path) -> None:
        self.name_or_path, given = str(folder), json.loads((folder / CONFIG).read_text("utf-8"))
        content = (folder / FILE).read_bytes()
        self.backend_tokenizer, self.digest = Backend.from_buffer(content), hashlib.sha256(content).hexdigest()
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        template = folder / TEMPLATE
        self.chat_template: Any = template.read_text("utf-8") if template.is_file() else given.get("chat_template")
        for name in NAMED:
            token = given.get(name)
            setattr(self, name, token["content"] if isinstance(token, dict) else token)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if (named := name.removesuffix("_id")) in NAMED:
            token = getattr(self, named)
            return None if token is None else self._id(token)
        return getattr(self.transformers, name)

    @functools.cached_property
    def transformers(self) -> Any:
        """Return the tokenizer of transformers for the same folder, loaded at the first access."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.name_or_path, local_files_only=True)

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def __call__(self, text: Any = None, *args: Any, **how: Any) -> Any:
        """Return the token ids of ``text``, a string or a list of strings, as an ``Encoding``.

        args, how: arguments of transformers' tokenizers. ``add_special_tokens`` (True) and ``split_special_tokens``
        (False) are supported here. With others, and for other kinds of text, the result is that of transformers'
        tokenizer, a ``BatchEncoding``.
        """
        several = isinstance(text, list | tuple)
        plain = isinstance(text, str) or (several and all(isinstance(each, str) for each in text))
        if args or not plain or how.keys() - ARGUMENTS:
            return self.transformers(text, *args, **how)
        backend, split = self.backend_tokenizer, bool(how.get("split_special_tokens", False))
        if backend.encode_special_tokens != split:
            backend.encode_special_tokens = split
        texts, special = list(text) if several else [text], how.get("add_special_tokens", True)
        found = backend.encode_batch(texts, add_special_tokens=special)
        ids = [each.ids for each in found]
        return Encoding(ids if several else ids[0])

    def encode(self, text: str, *args: Any, **how: Any) -> list[int]:
        if args or how.keys() - ARGUMENTS:
            return list(self.transformers.encode(text, *args, **how))
        return list(self(text, **how).input_ids)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **how: Any) -> Any:
        given = [ids] if isinstance(ids, Integral) else ids
        if how or not isinstance(given, list | tuple) or not all(isinstance(each, Integral) for each in given):
            return self.transformers.decode(ids, skip_special_tokens=skip_special_tokens, **how)
        return self.backend_tokenizer.decode([int(each) for each in given], skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        one = self.backend_tokenizer.id_to_token
        return one(int(ids)) if isinstance(ids, Integral) else [one(int(each)) for each in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return self._id(tokens) if isinstance(tokens, str) else [self._id(each) for each in tokens]

    def _id(self, token: str) -> int | None:
        found: int | None = self.backend_tokenizer.token_to_id(token)
        return self.unk_token_id if found is None and token != self.unk_token else found

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab())

    @functools.cached_property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Return {token id: ``tokenizers.AddedToken``} for tokens that are matched before text is split into words."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Return {name: token} for the special tokens that exist, such as {"bos_token": "<s>"}."""
        return {name: getattr(self, name) for name in NAMED if getattr(self, name) is not None}

    # -- chats --------------------------------------------------------------------------------------------------------

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """Return the chat template to use, as Jinja text. Raises ValueError if there is none.

        chat_template: the template that a caller gave, which is returned; None: the tokenizer's own. tools: has no
        effect; transformers' method takes it.
        """
        if chat_template is None and self.chat_template is None:
            raise ValueError("this tokenizer has no chat template")
        return str(self.chat_template if chat_template is None else chat_template)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **more: Any,
    ) -> Any:
        """Return the text of a chat; with ``tokenize``, what transformers' method of this name returns: its token ids.

        conversation: messages such as {"role": "user", "content": "..."}; or a list of such chats, for a list of
        results.
        tools, documents: values for the template; None: there are none.
        chat_template: a Jinja template to use; None: the tokenizer's own.
        add_generation_prompt: whether the text ends with the opening of the assistant's next message.
        continue_final_message: whether the text ends within the last message, to be continued.
        more: further variables of the template, by name; with ``tokenize``, further arguments of transformers' method.
        Raises ValueError if there is no template, or the last message cannot be continued.
        """
        from specdec.models.chat_template import render  # imports jinja2

        how: dict[str, Any] = {"documents": documents, "add_generation_prompt": add_generation_prompt}
        how |= {"continue_final_message": continue_final_message} | more
        single = not conversation or isinstance(conversation[0], dict)
        if tokenize or not single or any(callable(tool) for tool in tools or ()):
            given = {"tools": tools, "chat_template": chat_template, "tokenize": tokenize}
            return self.transformers.apply_chat_template(conversation, **given, **how)
        names = self.special_tokens_map | how
        return render(self.get_chat_template(chat_template, tools), conversation, tools, **names)
