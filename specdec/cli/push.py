"""``specdec push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.base.terminal import say


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A drafter folder.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A repository; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
) -> None:
    """Publish a drafter on Hugging Face, with a model card; --drafter ORG/NAME then loads it."""
    from specdec.integrations import hub

    say(f"pushed to {hub.push(folder, repository, private)}")
