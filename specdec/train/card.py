"""The model card that a training run writes beside its drafter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdec.base.files import write_atomically
from specdec.bench.prompts import PACKAGED, PROMPT_SETS
from specdec.models import drafter_folder
from specdec.models.catalogue import EMBEDDED
from specdec.train.settings import TrainSettings

CARD = "README.md"
FACTS = ("updates", "minutes", "machine", "answers", "tokens_in_answers", "tokens_seen")  # of the training
TEXT = """# {drafter} for {model}

| | |
|---|---|
| drafter | `{drafter}` |
| base model | {model}, fingerprint `{fingerprint}` |
| size | {megabytes:.1f} MB |
| licence | not chosen yet; it follows those of the base model ({licence}) and of the prompts |
| use | `specdec generate "Why is the sky blue?" --model {model} --drafter DIR` |

It belongs to the weights with this fingerprint; another model refuses it. Under the default verifier no drafter
changes the text.

## Training

{updates} updates in {minutes:g} minutes on {machine}: {answers} answers with {tokens_in_answers} tokens,
{tokens_seen} seen.

```bash
{command}
```

The base model was frozen. `train.yaml` holds all settings, `config.json` what the run saw.

## Held-out figures

On {positions} positions of held-out answers: {held_out}.
{kinds}
## Data

The model's own answers to these prompts:

| prompts | licence |
|---|---|
{data}

`specdec train` writes this card again when it finds a better drafter.
"""


def write_card(
    folder: Path, config: Mapping[str, Any], settings: TrainSettings, held_out: str, kinds: Mapping[str, str]
) -> None:
    """Write the model card of the drafter in ``folder``, its README.md. It names no path of this machine.

    config: the drafter's ``config.json``. settings: the run's, names in place of local paths (``output.recorded``).
    held_out: figures on held-out answers, as text. kinds: category of prompts -> figures on the answers to them, as
    text; {}: the card has no table of them.
    """
    model, options = config["base"]["name"], ["--model", settings.model, "--preset", "train.yaml"]
    for name in ("prompts", "holdout"):
        options += [word for each in getattr(settings, name) for word in (f"--{name}", each)]
    table = "".join(f"| {kind} | {figures} |\n" for kind, figures in kinds.items())
    text = TEXT.format(
        drafter=config["drafter"],
        model=model,
        fingerprint=config["base"]["fingerprint"],
        megabytes=(folder / drafter_folder.WEIGHTS).stat().st_size / 1e6,
        licence=EMBEDDED[model].licence if model in EMBEDDED else "its page names it",
        command=shlex.join(["specdec", "train", settings.method, *options, "--output", "DIR"]),
        positions=config["training"]["held_out"]["positions"],
        kinds=f"\n| prompts | held-out answers |\n|---|---|\n{table}" if table else "",
        data="\n".join(f"| {name} | {_licence(name)} |" for name in settings.prompts),
        held_out=held_out,
        **{key: config["training"][key] for key in FACTS},
    )
    write_atomically(folder / CARD, text.encode())


def _licence(prompts: str) -> str:
    if prompts in PACKAGED:
        return "Apache-2.0"
    return PROMPT_SETS[prompts].licence if prompts in PROMPT_SETS else "unknown; write it here"
