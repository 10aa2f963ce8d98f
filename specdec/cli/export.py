"""``specdec export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.base.terminal import say
from specdec.cli import shared
from specdec.models.names import check_model

app = typer.Typer(no_args_is_help=True, help="Write models and drafters for other libraries.")


@app.command(
    "custom-generate",
    epilog="Example: specdec export custom-generate --model my-model --drafter my-drafter --output REPO",
)
def custom_generate(
    output: Annotated[Path, typer.Option(metavar="REPO", help="Folder of the repository.")],
    argument: shared.ModelArgument = None,
    drafter: Annotated[str, typer.Option(metavar="DRAFTER", help="A drafter folder, or a name.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Also write this model there; else add the files to its repository yourself.")
    ] = None,
) -> None:
    """Write a repository for transformers, whose model.generate decodes with specdec."""
    if argument is not None or model is not None:
        model = shared.one_model(argument, model)
        check_model(model)
    from specdec.integrations.custom_generate import export
    from specdec.models import loading

    export(drafter, output, None if model is None else loading.load(model, device="cpu"))
    say(f"written to {output}; load it with from_pretrained(..., trust_remote_code=True)")
