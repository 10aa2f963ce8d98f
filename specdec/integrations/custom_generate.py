"""Write a repository whose ``custom_generate`` decodes with specdec (``trust_remote_code=True``)."""

from __future__ import annotations

import filecmp
import runpy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from specdec.base.errors import SpecDecError, errors_as, one_line
from specdec.models import drafter_folder
from specdec.models.gguf.blocks import densify
from specdec.models.native_model import as_transformers
from specdec.models.prepare import quiet_transformers
from specdec.speculation import registry

FOLDER, DRAFTER = "custom_generate", "drafter"
COMPARED = 16  # tokens that are decoded in both ways
GENERATE = '''"""Speculative decoding with specdec: model.generate(...) as usual."""

from pathlib import Path

from transformers.utils import cached_file

try:
    from specdec.integrations.transformers import SpecGenerate
except ImportError:
    raise ImportError(
        "this repository decodes with specdec (the distribution specdec-m2r2), which is not installed and is on no "
        "package index; run pip install . in a clone of it, or pip install its wheel"
    ) from None

DRAFTER, FILES = {drafter!r}, {files!r}  # files of the drafter in this repository
_made = {{}}


def generate(*args, model, **kwargs):
    name = model.name_or_path
    if name not in _made:
        drafter = DRAFTER
        if FILES:
            first, *_ = [Path(cached_file(name, "custom_generate/drafter/" + file)) for file in FILES]
            drafter += f"={{{place}}}"
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

`generate` decodes speculatively with specdec, drafter `{drafter}`. Greedy output is that of plain decoding, and
samples have the model's distribution. Beams are refused.

specdec is not on PyPI. Install it with `pip install .` in a clone of its repository, or from a wheel.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{title}")
inputs = tokenizer("Why is the sky blue?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
"""


def export(drafter: str, output: Path, model: tuple[Any, Any] | None = None) -> None:
    """Write the repository, with a copy of the drafter's files if it has any here.

    model: the model and its tokenizer, to be saved there; None leaves them out.
    Raises SpecDecError if files cannot be written, or if what was saved does not load and decode as the model.
    """
    [(name, source), *more] = registry.parse(drafter)
    if more:
        raise SpecDecError(f"a repository has one drafter; '{drafter}' joins several")
    where, files = output / FOLDER, [] if source is None else _files(Path(source))
    with errors_as(f"cannot write the repository to '{output}'", SafetensorError):
        where.mkdir(parents=True, exist_ok=True)
        if files:
            (where / DRAFTER).mkdir(exist_ok=True)
        for path in files:
            shutil.copyfile(path, where / DRAFTER / path.name)
        place = "first" if source is not None and Path(source).is_file() else "first.parent"
        made = {"drafter": name if files else drafter, "files": tuple(path.name for path in files), "place": place}
        (where / "generate.py").write_text(GENERATE.format(**made), "utf-8")
        if model is not None:
            model = as_transformers(model[0]), model[1]
            _save(*model, output)
        if not (output / "README.md").exists():
            (output / "README.md").write_text(CARD.format(title=output.resolve().name, drafter=name), "utf-8")
    if not all(filecmp.cmp(path, where / DRAFTER / path.name, shallow=False) for path in files):
        raise SpecDecError(f"the drafter in '{where}' differs from '{source}'; delete the folder and export again")
    if model is not None:
        _compare(model[0], output)


def _files(source: Path) -> list[Path]:
    """The files of a drafter here: a file, a drafter folder, or one in another library's format; none elsewhere."""
    if not source.is_dir():
        return [source] if source.is_file() else []
    config = source / drafter_folder.CONFIG
    if config.is_file() and "drafter" in drafter_folder.read_json(config):
        return [source / drafter_folder.CONFIG, source / drafter_folder.WEIGHTS]
    return sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    """Save a model and its tokenizer. Weights in GGUF blocks are dequantised to the model's dtype."""
    densify(model)
    with quiet_transformers(f"Writing {output}"):
        for part in (model, tokenizer):
            part.save_pretrained(output)


@torch.inference_mode()
def _compare(model: Any, output: Path) -> None:
    """Raise SpecDecError unless the model in ``output`` has the logits of ``model``, and decodes its text, there."""
    ids = 31 * torch.arange(1, 17)[None] % model.get_input_embeddings().weight.shape[0]
    try:
        with quiet_transformers():
            loaded = type(model).from_pretrained(output, dtype=model.dtype, local_files_only=True).eval()
        same = torch.allclose(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
        why = "" if same else "its logits differ"
        if same:
            plain = {"max_new_tokens": COMPARED, "do_sample": False, "pad_token_id": 0}
            decode = runpy.run_path(str(output / FOLDER / "generate.py"))["generate"]
            same = torch.equal(decode(ids, model=loaded, **plain), loaded.generate(ids, **plain))
            why = "" if same else "its text differs"
    except Exception as error:  # whatever transformers raises
        why = one_line(error)
    if why:
        raise SpecDecError(f"what was written to '{output}' does not work as the model ({why}); delete the folder")
