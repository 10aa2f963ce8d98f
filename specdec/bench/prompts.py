"""Prompt sets: a file, one of the small sets in the package, or a public set by name.

A public set comes from the data folder or a download. Downloads have a fixed revision and a known SHA-256 and stay in
the cache folder; a set without a known checksum is not downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from specdec.base import files, inputs
from specdec.base.errors import SpecDecError, did_you_mean, one_line

T = TypeVar("T")
TIMEOUT = 20  # seconds until a download must respond
MAX_BYTES = 1 << 26  # largest size of a download

Turns = Callable[[dict[str, Any]], Any]  # reads the text of the first turn from a record of a file; None: not there


@dataclass(frozen=True)
class Conversation:
    """A conversation of a prompt set: the user's turns (messages), each sent after the answer to the turn before.

    id: name of the conversation in its file. category: its kind, such as "writing"; "" if the file gives none.
    turns: the texts of the user.
    """

    id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a benchmark: the conversations of one file, or of one named set (``specdec bench --prompts``).

    name: name of the set, or path of the file.
    conversations: the conversations, in the file's order.
    sha256: checksum of the file, in hexadecimal.
    licence: licence and web page of a public set; "" for files and the sets in the package.
    """

    name: str
    conversations: tuple[Conversation, ...]
    sha256: str
    licence: str = ""


@dataclass(frozen=True)
class PromptSource:
    """Where a public prompt set comes from.

    page: where a user finds the file. licence: the license of the set.
    url, sha256: a fixed revision of the file and its checksum; None: the user has to download the file.
    turns: returns the prompt of a record that has no 'turns' entry.
    """

    page: str
    licence: str
    url: str | None = None
    sha256: str | None = None
    turns: Turns = lambda record: None


RAW = "https://raw.githubusercontent.com/"
CODE = "Complete the following Python function. Answer with the whole function.\n\n```python\n"
PACKAGED = ("own", "work")  # sets in the package: short tasks of many kinds; code, rewriting and agents
PROMPT_SETS: dict[str, PromptSource] = {
    "mt-bench": PromptSource(
        "https://github.com/lm-sys/FastChat (fastchat/llm_judge/data/mt_bench/question.jsonl)",
        "Apache-2.0",
        RAW + "lm-sys/FastChat/587d5cfa1609a43d192cedb8441cac3c17db105d/"
        "fastchat/llm_judge/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    "spec-bench": PromptSource(
        "https://github.com/hemingkx/Spec-Bench (data/spec_bench/question.jsonl)",
        "Apache-2.0; its parts have licences of their own",
        RAW + "hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/question.jsonl",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
    ),
    "gsm8k": PromptSource(
        "https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)",
        "MIT",
        RAW + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        lambda record: record.get("question"),
    ),
    "humaneval": PromptSource(
        "https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)",
        "MIT",
        RAW + "openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        lambda record: CODE + record["prompt"].rstrip() + "\n```" if "task_id" in record else None,
    ),
    "koala": PromptSource(
        "https://github.com/arnav-gudibande/koala-test-set (koala_test_set.jsonl)",
        "Apache-2.0; its authors ask not to train on it",
    ),
    "self-instruct": PromptSource(
        "https://github.com/yizhongw/self-instruct (human_eval/user_oriented_instructions.jsonl)",
        "Apache-2.0",
        turns=lambda record: _with_input(record.get("instruction"), (record.get("instances") or [{}])[0].get("input")),
    ),
    "wizardlm": PromptSource(
        "https://github.com/nlpxucan/WizardLM (WizardLM/data/WizardLM_testset.jsonl)",
        "CC BY-NC 4.0 (research, not commercial)",
        turns=lambda record: record.get("Instruction"),
    ),
}


def load_prompts(name: str) -> PromptSet:
    """Load the prompt set ``name``: one of ``PACKAGED`` or ``PROMPT_SETS``, or the path of a file.

    A file is JSONL with ``turns`` (or ``prompt``) and optionally ``category`` and ``id``, or plain lines, one prompt
    each; ``.gz`` is unpacked. A file that is called like a public set is read in the format of that set. A public set
    is read from ``NAME.jsonl`` in the data folder (also with underscores), else downloaded. Raises SpecDecError for an
    unknown name, a missing or empty file, and a broken line, with its number.
    """
    if name in PACKAGED:
        return _read(name, Path(str(importlib.resources.files("specdec.bench") / "data" / f"{name}.jsonl")))
    path = Path(name).expanduser()
    if name in PROMPT_SETS:
        local = [files.data_dir() / f"{each}.jsonl" for each in (name, name.replace("-", "_"))]
        path = next(filter(Path.is_file, local), None) or _downloaded(name, PROMPT_SETS[name])
    elif not path.is_file():
        known = [*PACKAGED, *PROMPT_SETS]
        raise SpecDecError(
            f"there is no prompt file '{name}'{did_you_mean(name, known)}; give a file or one of {', '.join(known)}"
        )
    source = PROMPT_SETS.get(path.name.partition(".")[0].replace("_", "-"))
    if name not in PROMPT_SETS:
        return _read(path.name, path, source)
    return replace(_read(name, path, source), licence=f"{PROMPT_SETS[name].licence}; {PROMPT_SETS[name].page}")


def evenly_spaced(items: Sequence[T], limit: int | None) -> list[T]:
    """Return ``limit`` of ``items`` at equal distances, so that a file sorted by category yields some of each.

    limit: None: all.
    """
    count = len(items)
    if limit is None or limit >= count:
        return list(items)
    return [items[i * count // limit] for i in range(limit)]


def _downloaded(name: str, source: PromptSource) -> Path:
    """Return the file of the public set ``name``, downloaded from ``source`` to the cache folder if it is missing.

    Raises SpecDecError if ``source`` has no address, the download fails or the checksum is wrong.
    """
    by_hand = f"give it as a file '{name}.jsonl', or put it into {files.data_dir()}; it is at {source.page}"
    if source.url is None or source.sha256 is None:
        raise SpecDecError(f"prompt set '{name}' is not downloaded: it has no published checksum; {by_hand}")
    path = files.cache_dir() / "prompts" / f"{name}.jsonl{'.gz' if source.url.endswith('.gz') else ''}"
    if path.is_file() and inputs.sha256(path) == source.sha256:
        return path
    try:
        with urllib.request.urlopen(source.url, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_BYTES)
    except (OSError, ValueError, HTTPException) as error:
        raise SpecDecError(f"prompt set '{name}' cannot be downloaded ({one_line(error)}); {by_hand}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise SpecDecError(
            f"checksum mismatch: {source.url} has sha256 {found} instead of {source.sha256}; try again, or {by_hand}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, data)
    return path


def _read(name: str, path: Path, source: PromptSource | None = None) -> PromptSet:
    """Read the file ``path`` as the prompt set ``name``. Raises SpecDecError if it is empty or broken.

    source: the public set in whose format the records may be; None: only the formats of ``load_prompts``.
    """
    records = list(inputs.prompts(path))
    if not records:
        raise SpecDecError(f"prompt file '{path}' is empty; give one prompt a line")
    turns = (lambda record: None) if source is None else source.turns
    conversations = [_conversation(str(n), where, record, turns) for n, (where, record) in enumerate(records, start=1)]
    return PromptSet(name, tuple(conversations), inputs.sha256(path))


def _conversation(number: str, where: str, record: dict[str, Any], read_prompt: Turns) -> Conversation:
    """Return the conversation of one ``record`` of a file.

    number: its id if it has none. where: names the line in an error. read_prompt: returns the prompt of a record that
    has no "turns", or fails or returns None. Raises SpecDecError if the record has no text.
    """
    prompt = None
    with suppress(AttributeError, IndexError, KeyError, TypeError):  # a record of another form
        prompt = read_prompt(record)
    turns = inputs.turns({"prompt": prompt} if prompt and "turns" not in record else record)
    if not turns:
        raise SpecDecError(f"{where} has no usable 'turns' or 'prompt'; repair or remove it")
    name = next((record[key] for key in ("id", "question_id", "task_id", "idx") if key in record), number)
    return Conversation(str(name), str(record.get("category", "")), turns)


def _with_input(instruction: Any, given: Any) -> Any:
    return f"{instruction}\n\n{given}" if instruction and given else instruction
