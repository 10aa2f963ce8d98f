"""``specdec train``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.interrupts import interrupt, interrupting
from specdec.base.terminal import stderr, tell, write
from specdec.cli import shared
from specdec.models.names import check_model
from specdec.train import data
from specdec.train.method import METHODS, PRESETS
from specdec.train.settings import load_settings, read_preset

# What a run writes for those that continue it, by its file (``train.output``, which imports torch).
SAVED = {
    "answers.jsonl": "answers",
    "states": "the model's states",
    "checkpoint.pt": "the last checkpoint",
    "model.safetensors": "the best drafter so far",
}
app = typer.Typer(no_args_is_help=True, help="Train drafters for a model, from its own answers.")


def run(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the drafter and the state of the run.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME",
            help="JSONL of prompts or of answers in token ids, one prompt a line (also .gz), or a set of bench: own.",
            autocompletion=shared.complete_prompts,
        ),
    ] = None,
    argument: shared.ModelArgument = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model: a name, a folder or a Hugging Face id.", autocompletion=shared.complete_model),
    ] = None,
    adapter: shared.Adapter = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings: a preset's name or a YAML file; default: the method's preset.",
            autocompletion=shared.complete_config("train"),
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of gradient training, in total.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of updates, instead of --minutes.")] = None,
    holdout: Annotated[
        list[str] | None, typer.Option(metavar="FILE|NAME", help="Like --prompts; these must not be trained on.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of shuffling and of the first weights.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of train.yaml.")
    ] = None,
) -> None:
    """Train the drafter that the command is named after."""
    console = stderr()
    with _interruptible(output, resume, console):
        if argument is not None or model is not None:
            model = shared.one_model(argument, model)
            check_model(model)
        shared.check_adapter(adapter)
        overrides: dict[str, Any] = {
            "output": str(output), "model": model, "adapter": adapter, "minutes": minutes, "steps": steps,
            "dtype": dtype, "device": device, "seed": seed, "prompts": prompts or None, "holdout": holdout or None,
        }  # fmt: skip
        overrides |= options.parse_assignments("--set", set_ or [])
        command = str(context.command.name)
        method, preset = PRESETS.get(command, command), preset or command
        # Wrong prompts are known before anything heavy is imported.
        given = read_preset(preset) | {name: value for name, value in overrides.items() if value}
        data.read(_names("prompts", given.get("prompts", [])))
        for key in ("holdout", "evaluation"):
            if given.get(key):
                data.read(_names(key, given[key]))
        from specdec.train.method import lookup  # heavy imports stay out of --help
        from specdec.train.trainer import train

        kind = lookup(method)
        figures = train(load_settings(kind.settings_class, method, preset, overrides), resume, console, preset)
        if not console.quiet:  # it is for all processes but the first
            write(f"{output}: {kind.describe(figures)}\n")


def _names(key: str, value: Any) -> list[str]:
    """Return the files and prompt sets that ``value`` of the setting ``key`` names. Raises SpecDecError for others."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SpecDecError(f"'{key}' must be the name of a file or of a prompt set, or a list of names; got {value!r}")
    return names


@contextmanager
def _interruptible(output: Path, resume: bool, console: Console) -> Iterator[None]:
    """After Ctrl-C or SIGTERM in the ``with`` block, print what is saved and how to go on, and raise typer.Exit.

    output: the run's folder. resume: whether the command line says --resume already. console: where it prints; quiet in
    all processes but the first. The exit code is 130.
    """
    try:
        with interrupting(interrupt, ended=True):
            yield
    except KeyboardInterrupt:
        if not console.quiet:  # as in ``run``
            saved = [what for name, what in SAVED.items() if (output / name).exists()]
            if saved:
                again = shared.command_line(*([] if resume else ["--resume"]))
                tell(console, f"interrupted; '{output}' keeps {', '.join(saved)}; continue with: {again}")
            else:
                tell(console, f"interrupted before anything was saved; start again with: {shared.command_line()}")
        raise typer.Exit(shared.INTERRUPTED) from None


for _name in (*METHODS, *PRESETS):
    what = f"Train {PRESETS[_name]} with the preset {_name}" if _name in PRESETS else f"Train {_name}"
    app.command(
        _name,
        help=f"{what} for a model by distillation from it; the model stays frozen.",
        epilog=f"Example: specdec train {_name} --prompts prompts.jsonl --output my-drafter --minutes 30",
    )(run)
