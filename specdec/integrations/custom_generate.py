"""Write a repository whose ``custom_generate`` decodes with specdec (``trust_remote_code=True``)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from specdec.base.errors import SpecDecError, one_line, reported
from specdec.models import drafter_folder
from specdec.models.gguf.blocks import densify
from specdec.models.prepare import quiet_transformers
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
    """Write the repository, with a copy of the drafter folder if the drafter has one.

    model: the model and its tokenizer, to be saved there; None leaves them out.
    Raises SpecDecError if files cannot be written, or if the saved model does not load with the same logits.
    """
    [(name, source), *more] = registry.parse(drafter)
    if more:
        raise SpecDecError(f"a repository has one drafter; '{drafter}' joins several")
    where, files = output / FOLDER, (drafter_folder.CONFIG, drafter_folder.WEIGHTS)
    with reported(f"cannot write the repository to '{output}'", SafetensorError):
        where.mkdir(parents=True, exist_ok=True)
        if source is not None and Path(source).is_dir():
            (where / DRAFTER).mkdir(exist_ok=True)
            for file in files:
                shutil.copyfile(Path(source, file), where / DRAFTER / file)
        named = drafter if source is None else None
        (where / "generate.py").write_text(GENERATE.format(drafter=named, files=files), "utf-8")
        (where / "requirements.txt").write_text(REQUIREMENTS, "utf-8")
        if model is not None:
            _save(*model, output)
        if not (output / "README.md").exists():
            (output / "README.md").write_text(CARD.format(title=output.resolve().name, drafter=name), "utf-8")
    if model is not None:
        _compare(model[0], output)


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    """Save a model and its tokenizer. Weights in GGUF blocks are dequantised to the model's dtype."""
    densify(model)
    with quiet_transformers(f"Writing {output}"):
        for part in (model, tokenizer):
            part.save_pretrained(output)


@torch.inference_mode()
def _compare(model: Any, output: Path) -> None:
    """Raise SpecDecError unless the model in ``output`` has the logits of ``model`` on a fixed input."""
    ids = 31 * torch.arange(1, 17)[None] % model.get_input_embeddings().weight.shape[0]
    try:
        with quiet_transformers():
            loaded = type(model).from_pretrained(output, dtype=model.dtype, local_files_only=True).eval()
        same = torch.allclose(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
        why = "" if same else "its logits differ"
    except Exception as error:  # whatever transformers raises
        why = one_line(error)
    if why:
        raise SpecDecError(f"what was written to '{output}' loads as another model ({why}); delete the folder")
