"""``specdec train``: the command line of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.base import options
from specdec.base.terminal import stderr, write
from specdec.train.method import METHODS

app = typer.Typer(no_args_is_help=True, help="Train drafters for a model, from its own answers.")


def run(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the drafter and everything the run needs to go on.")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="JSONL of prompts or token-id answers, or plain lines; .gz too.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Plain text to learn from as it is, beside answers or alone; .gz too.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a name, a folder or a Hugging Face id.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings: a preset's name or a YAML file; else the method's own preset.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Length of the gradient training; with --resume, from its beginning.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Its length in updates, instead of minutes.")] = None,
    holdout: Annotated[list[Path] | None, typer.Option(help="Files whose prompts must not be trained on.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of shuffling and of the first weights.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="m2r2: choose the layers by closed-form acceptance and measured cost.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of train.yaml.")
    ] = None,
) -> None:
    """Train the drafter that the command is named after."""
    from specdec.train.method import lookup  # heavy imports stay out of --help
    from specdec.train.settings import load_settings
    from specdec.train.speed import speedup_text
    from specdec.train.trainer import train
    from specdec.train.world import leads

    overrides: dict[str, Any] = {
        "output": str(output),
        "model": model, "minutes": minutes, "steps": steps, "dtype": dtype, "device": device, "seed": seed,
    }  # fmt: skip
    for name, paths in (("prompts", prompts), ("text", text), ("holdout", holdout)):
        overrides[name] = [str(path) for path in paths] if paths else None
    overrides |= ({"search": True} if search else {}) | options.parse_assignments("--set", set_ or [])
    method = str(context.command.name)
    kind = lookup(method)
    console = stderr()
    console.quiet = not leads()
    figures = train(load_settings(kind.settings_class, method, preset, overrides), resume, console)
    if leads():
        write(f"{output}: {kind.describe(figures)}{speedup_text(figures)}\n")


for _name in METHODS:
    app.command(
        _name,
        help=f"Train {_name} for a model by distillation from it; the model stays frozen.",
        epilog=f"Example: specdec train {_name} --prompts prompts.jsonl --output my-drafter --minutes 30",
    )(run)
