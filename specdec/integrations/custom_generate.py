"""A repository whose ``custom_generate`` decodes with specdec, for ``from_pretrained(..., trust_remote_code=True)``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.integrations.hub import RECIPE
from specdec.models import drafter_folder
from specdec.speculation import registry

FOLDER, DRAFTER = "custom_generate", "drafter"
REQUIREMENTS = "specdec-m2r2\n"
GENERATE = '''"""Speculative decoding with specdec: model.generate(...) as usual."""

from pathlib import Path

from specdec.integrations.transformers import SpecGenerate
from transformers.utils import cached_file

DRAFTER = {drafter!r}  # None: the one in this repository
_made = {{}}


def generate(*args, model, **kwargs):
    name = model.name_or_path
    if name not in _made:
        drafter = DRAFTER
        if drafter is None:
            files = [cached_file(name, "custom_generate/drafter/" + file) for file in {files!r}]
            drafter = Path(files[0]).parent
        _made[name] = SpecGenerate(drafter)
    return _made[name].generate(model, *args, **kwargs)
'''
CARD = """---
library_name: transformers
tags:
- custom_generate
- specdec
---

# {title}

`generate` decodes speculatively with [specdec](https://pypi.org/project/specdec-m2r2), drafter `{drafter}`. Greedy
output is that of plain decoding; samples have the model's distribution. Beams are refused.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{title}")
inputs = tokenizer("Why is the sky blue?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
"""


def export(drafter: str, output: Path, model: tuple[Any, Any] | None = None) -> None:
    """Write the repository. model: with its tokenizer, to be written there, too; else ``output`` has it or never will.

    A drafter folder goes into the repository; a drafter that needs none is named.
    """
    [(name, source), *more] = registry.parse(drafter)
    if more:
        raise SpecDecError(f"a repository has one drafter; '{drafter}' joins several")
    where = output / FOLDER
    try:
        where.mkdir(parents=True, exist_ok=True)
        if source is not None and Path(source).is_dir():
            _copy(Path(source), where / DRAFTER)
        named = drafter if source is None else None
        files = (drafter_folder.CONFIG, drafter_folder.WEIGHTS)
        (where / "generate.py").write_text(GENERATE.format(drafter=named, files=files), "utf-8")
        (where / "requirements.txt").write_text(REQUIREMENTS, "utf-8")
        if model is not None:
            for part in model:
                part.save_pretrained(output)
        if not (output / "README.md").exists():
            (output / "README.md").write_text(CARD.format(title=output.resolve().name, drafter=name), "utf-8")
    except OSError as error:
        raise SpecDecError(f"cannot write the repository to '{output}': {error.strerror or error}") from None


def _copy(folder: Path, to: Path) -> None:
    """Copy a drafter folder: its data, and the recipe."""
    with drafter_folder.opened(folder / drafter_folder.WEIGHTS):
        pass  # it is a safetensors file
    to.mkdir(exist_ok=True)
    for name in (drafter_folder.CONFIG, drafter_folder.WEIGHTS, RECIPE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
