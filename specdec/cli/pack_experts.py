"""``specdec pack-experts``: a packed file of a model's experts, and a predictor for prefetching."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.terminal import Bar, print_table, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.train.data import TrainingAnswer

HELD_OUT = 8  # every 8th text is held out for evaluation, at most 8 texts
NEW_TOKENS = 192  # of an answer that the model generates


def pack_experts(
    model: Annotated[str, typer.Argument(help="A mixture-of-experts model: a folder or a Hugging Face id.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the packed file.")],
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")] = "auto",
    fit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also fit the m2r2 predictor, on answers (token ids) or prompts in JSONL; .gz too."
        ),
    ] = None,
    texts: Annotated[int, typer.Option(help="Texts of FILE to fit on.", min=4)] = 128,
    expert_cache: Annotated[
        str, typer.Option(metavar="SIZE", help="Share (0.25) or size (8GB) of the experts that --fit keeps in memory.")
    ] = "1.0",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Write the experts of a model into one file, from which generate --expert-cache loads them on demand."""
    from specdec.models import identity, loading
    from specdec.runtimes.experts import packed
    from specdec.runtimes.experts.layers import moe_layers
    from specdec.runtimes.experts.offload import ExpertOptions, Offload

    items, cache = None if fit is None else _read(fit), options.parse_size("--expert-cache", expert_cache)
    loaded, tokenizer = loading.load(model, dtype=dtype, trust_remote_code=trust_remote_code, experts=False)
    layers, fingerprint = moe_layers(loaded), identity.fingerprint(loaded)
    with Bar("packing", "experts") as update:
        index = packed.pack(layers, fingerprint, folder, update)
    write(
        f"{folder / packed.BLOCKS}: {len(index.layers)} layers of {index.num_experts} experts, "
        f"{index.stride / 1e6:.2f} MB each, {index.total_bytes / 1e6:.0f} MB\n"
    )
    if items is not None:
        with closing(Offload(loaded, fingerprint, ExpertOptions(cache, folder=folder))):
            _fit(loaded, fingerprint, folder, _answers(loaded, tokenizer, items[:texts]))


def _fit(loaded: PreTrainedModel, fingerprint: str, folder: Path, answers: list[TrainingAnswer]) -> None:
    """Fit the predictor to most of ``answers``, write it, and print its recall on the others."""
    from specdec.runtimes.experts import predict
    from specdec.runtimes.experts.layers import moe_layers
    from specdec.train.expert_predictor import fit_predictor, recalls

    held = answers[::HELD_OUT][:HELD_OUT]
    rest = [answer for answer in answers if answer not in held]
    with Bar("fitting", "texts") as update:
        predictor = fit_predictor(loaded, rest, lambda done: update(done, len(rest)))
    residual = predict.residual(moe_layers(loaded))
    found = recalls(loaded, {"m2r2": predictor, "residual": residual}, held)
    figures = {name: {str(ahead): share for ahead, share in by.items()} for name, by in found.items()}
    predict.write_predictor(folder, predictor, fingerprint, {"recall": figures, "texts": len(rest)})
    write(f"{folder / predict.FOLDER}: predicted share of the needed experts by layers ahead, on held-out texts\n")
    rows = [(name, *(f"{share:.1%}" for share in by.values())) for name, by in figures.items()]
    print_table(("predictor", *next(iter(figures.values()))), rows)


def _read(path: Path) -> list[Any]:
    from specdec.train.data import read

    items = read([path])
    if len(items) < 4:
        raise SpecDecError(f"'{path}' has {len(items)} texts; a predictor needs at least 4")
    return items


def _answers(model: Any, tokenizer: Any, items: list[Any]) -> list[TrainingAnswer]:
    """The texts as answers; the model answers prompts."""
    from specdec.api.decoder import SpecDecoder
    from specdec.train.answers import encode_prompts
    from specdec.train.data import TrainingAnswer

    out = []
    decoder = None
    with Bar("answering", "prompts") as update:
        for number, item in enumerate(encode_prompts(tokenizer, items, model.config._name_or_path), start=1):
            if not isinstance(item, TrainingAnswer):
                decoder = decoder or SpecDecoder(model, tokenizer, "none")
                reply = decoder.generate(item, max_new_tokens=NEW_TOKENS)
                item = TrainingAnswer(tuple(item), tuple(reply.token_ids))
            out.append(item)
            update(number, len(items))
    return out
