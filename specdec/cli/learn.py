"""``specdec learn``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.base.terminal import say
from specdec.cli import shared
from specdec.models.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from specdec.drafters.m2r2.learned import Progress
    from specdec.runtimes.target import Target


class _ModelFirst(TyperGroup):
    """The group of ``specdec learn``, in which ``learn MODEL`` means ``learn ahead MODEL``."""

    def parse_args(self, context: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["ahead", *args]
        return super().parse_args(context, args)  # type: ignore[arg-type]


app = typer.Typer(
    cls=_ModelFirst,
    no_args_is_help=True,
    help="Drafters that learn from texts: what they have learned, and learning ahead of time ('specdec learn MODEL').",
)


@app.command("ahead", epilog="Example: specdec learn my-model --prompts prompts.jsonl --minutes 10")
@shared.grouped
def ahead(
    model: shared.NamedModel = "",
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Prompts to answer first, as in bench; default: none.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="How long to learn.")] = 3.0,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model that MODEL is a fine-tune of: begin with what was learned for it."),
    ] = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    runtime: shared.Runtime = "auto",
    adapter: shared.Adapter = None,
) -> None:
    """Teach a model's drafter ahead of time, with conversations that the model makes up. The same as learn MODEL."""
    for name in filter(None, (model, base)):
        shared.check_model(name)
    shared.check_adapter(adapter)
    from specdec.bench.prompts import load_prompts

    given = [] if prompts is None else [each.turns[0] for each in load_prompts(prompts).conversations]
    with terminal.status(f"preparing {model}"):
        terminal.warn_in_lines()
        from specdec.api.decoder import SpecDecoder
        from specdec.api.priming import prime
        from specdec.models import drafter_folder

        how = {"dtype": dtype, "device": device, "runtime": runtime, "adapter": adapter}
        decoder = SpecDecoder.from_pretrained(model, "none", learn=False, **how)  # type: ignore[arg-type]
        if base is not None:
            _begin_from(decoder.target, base)
        decoder = decoder.with_drafter("auto")
        if decoder.drafter.learner is None and (shipped := drafter_folder.find_shipped("m2r2", decoder.target)):
            own = model if adapter is None else f"{model} --adapter {adapter}"
            raise SpecDecError(
                f"the m2r2 shipped for '{model}' is trained, and does not learn by itself; to train it on "
                f"your prompts: specdec train m2r2 --model {own} --prompts FILE --output DIR --set init={shipped}"
            )
    with terminal.Bar("learn", "") as bar:
        found = prime(decoder, given, 60 * minutes, bar)
    say(
        f"learned from {found.tokens:,} tokens; mean acceptance length on held-out questions: "
        f"{found.before:.2f} before, {found.after:.2f} after"
    )


@app.command("status", epilog="Example: specdec learn status --json")
def status(as_json: shared.JsonLine = False) -> None:
    """Show what was learned for each model: from how many tokens, since when, and how well drafts agree."""
    from specdec.drafters.m2r2 import learned

    found = learned.all_progress()
    if as_json:
        shared.print_json([{"file": str(path), **(asdict(each) if each else {})} for path, each in found])
        return
    if not found:
        say(f"nothing was learned yet; files would be in {learned.folder()}")
        return
    rows = list[tuple[str, ...]]()
    for path, each in found:
        size = terminal.megabytes(path.stat().st_size)
        if each is None:
            rows.append((path.name, "cannot be used; 'specdec learn reset' removes it", "", "", size))
            continue
        name = each.model + (f" with {Path(each.adapter).name}" if each.adapter else "")
        latest = f"{100 * each.agreement[-1][1]:.0f} %" if each.agreement else "no fit yet"
        rows.append((name, f"{each.tokens:,}", each.since, latest, size))
    terminal.print_table(("model", "tokens", "since", "agreement", "size"), rows)


@app.command("reset", epilog="Example: specdec learn reset my-model")
def reset(
    argument: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Only this model; default: all.", autocompletion=shared.complete_model),
    ] = None,
    named: shared.ModelOption = None,
) -> None:
    """Forget what was learned; for all models, also the tokens that --keep-ngrams has kept."""
    from specdec.drafters.m2r2 import learned
    from specdec.drafters.ngram_store import forget

    if argument is None and named is None:
        found, stems = learned.all_progress(), None
        if kept := forget():
            say(f"deleted the tokens of earlier requests, {kept} file{'' if kept == 1 else 's'}")
    else:
        found = [*_learned_for(shared.one_model(argument, named))]
        stems = {path.stem for path, _ in found}
    if learned.forget(stems):
        say("a process that is learning now starts anew")
    say(f"forgot what was learned for {len(found)} model{'' if len(found) == 1 else 's'}")


@app.command("export", epilog="Example: specdec learn export my-drafter --model my-model")
def export(
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the drafter.")],
    argument: shared.ModelArgument = None,
    model: shared.Model = DEFAULT_MODEL,
    adapter: shared.Adapter = None,
) -> None:
    """Write what was learned as an ordinary drafter folder, for --drafter DIR."""
    model = shared.one_model(argument, model, DEFAULT_MODEL)
    shared.check_model(model)
    shared.check_adapter(adapter)
    with terminal.status(f"preparing {model}"):
        from specdec.api.decoder import SpecDecoder
        from specdec.drafters.m2r2 import M2R2Drafter
        from specdec.models import drafter_folder, source

        decoder = SpecDecoder.from_pretrained(model, "none", learn=False, adapter=adapter)
        drafter = M2R2Drafter.load(decoder.target)
        if drafter.learner is None:
            raise SpecDecError(f"the m2r2 drafter of '{model}' was trained and does not learn; --drafter m2r2 uses it")
        if not drafter.learner.version:
            raise SpecDecError(f"nothing that drafts was learned for '{model}' yet; specdec learn {model} does so now")
        base = drafter_folder.describe_base(decoder.target, source.public_name(model, adapter))
    config = {"drafter": "m2r2", "path": drafter.network.path.to_json(), "base": base}
    drafter_folder.write(output, config, dict(drafter.network.state_dict()), "int8")
    say(f"written to {output}; use it with --drafter {output}")


def _begin_from(target: Target, base: str) -> None:
    """Copy the file of what was learned for the model named ``base`` as a start for ``target``, another model.

    Raises SpecDecError if ``target`` has learned already, nothing was learned for ``base``, or its shape is another.
    """
    from specdec.drafters.m2r2 import learned
    from specdec.drafters.m2r2.fits import learned_path

    own, path = str(target.model.config._name_or_path), str(learned_path(target))
    store = learned.Store(target.fingerprint, path)
    if store.path.exists():
        raise SpecDecError(f"'{own}' has learned already; 'specdec learn reset {own}' forgets it")
    found = _learned_for(base)
    if not (same := [(each.tokens, file) for file, each in found if each.path == path]):
        raise SpecDecError(f"'{base}' has another shape than '{own}', so it cannot be its base")
    learned.begin_from(store, max(same)[1], learned.whole_name(own))


def _learned_for(model: str) -> list[tuple[Path, Progress]]:
    """Return (file, progress) of each file that holds what was learned for the model named ``model``.

    Raises SpecDecError if there is none.
    """
    from specdec.drafters.m2r2 import learned

    names = model, learned.whole_name(model)
    found = [(path, each) for path, each in learned.all_progress() if each and each.model in names]
    if not found:
        raise SpecDecError(f"nothing was learned for '{model}'; see 'specdec learn status'")
    return found
