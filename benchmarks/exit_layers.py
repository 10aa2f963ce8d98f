"""Acceptance and speed of both forms of M2R2 by the layers that a draft runs.

    python benchmarks/exit_layers.py MODEL --shapes 2,8,0:19-24,2:23-24 --prompts answers.jsonl --output exits.json
    python benchmarks/exit_layers.py MODEL --drafters DRAFTER_FOLDER,... --costs --output exits.json
    python benchmarks/exit_layers.py --output exits.json --draw exits.png

"2" is the published form with its exit behind 2 layers; "2:23-24" runs 2 early layers, then layers 23 and 24 from a
projection of their result. These are fitted in closed form on answers of the model, as ``specdec train`` writes them.
Trained drafters have their figures in their folders. ``--costs`` times all of them in turns, on an idle machine, and
predicts speeds over plain decoding; a measured one can be added to a row by hand. The output keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from specdec.api.decoder import SpecDecoder
from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path, PaperM2R2Drafter, load_network
from specdec.engine.measure import measure
from specdec.models import drafter_folder, loading
from specdec.train import batches, data
from specdec.train.evaluate import evaluate, predict_speedup
from specdec.train.m2r2_settings import path_states
from specdec.train.states import compute_states
from specdec.train.student import fit_projections
from specdec.train.trainer import training_target

Row = dict[str, Any]  # shape, drafter (a folder, or none: closed form), top1, chain, predicted, measured
VOCABULARY, BATCH = 16_384, (16, 64)  # rows of a batch, and their answer positions


def path_of(shape: str) -> M2R2Path:
    early, _, layers = shape.partition(":")
    lo, _, last = layers.partition("-")
    return M2R2Path(int(early), ((int(lo), int(last) + 1),) if layers else (), True)


def fitted(name: str, shapes: list[str], answers: list[data.TrainingAnswer]) -> Iterator[Row]:
    """Rows of shapes in closed form."""
    model, tokenizer = loading.load(name, dtype="float32", device="cpu")
    teacher, target = SpecDecoder(model, tokenizer, drafter="none").target, training_target(model)
    train, held_out = data.split(answers, 0.1)
    vocab = data.draft_vocabulary(train, VOCABULARY, (), target.vocab_size)
    for shape in shapes:
        network = M2R2(path_of(shape), target, vocab).requires_grad_(False)
        wanted = path_states(network.path, target.num_layers)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            kept, tested = (
                compute_states(Path(folder, str(len(part))), teacher, part, wanted, student=target)
                for part in (train, held_out)
            )
            fit_projections(network, target, lambda: batches.by_length(kept, *BATCH, target.device, target.dtype))  # noqa: B023
            found = evaluate(network, target, batches.by_length(tested, *BATCH, target.device, target.dtype))
        yield {"shape": shape, "drafter": None, "top1": found["top1"], "chain": found["chain"]}


def trained(folder: str) -> Row:
    """The row of a drafter in a folder."""
    config = drafter_folder.read_json(Path(folder, drafter_folder.CONFIG))
    path, found = M2R2Path.from_json(config["path"]), config["training"]["held_out"]
    layers = "".join(f":{lo}-{hi - 1}" for lo, hi in path.segments)
    return {"shape": f"{path.exit_layer}{layers}", "drafter": folder, "top1": found["top1"], "chain": found["chain"]}


def predict(name: str, rows: list[Row]) -> None:
    """Time drafters of all rows in turns, and add the speeds that follow."""
    decoder, drafters = SpecDecoder.from_pretrained(name, drafter="none", learn=False), list[M2R2Drafter]()
    vocab = torch.arange(VOCABULARY, dtype=torch.int32)
    for row in rows:
        path, folder = path_of(row["shape"]), row["drafter"]
        network = load_network(decoder.target, Path(folder)) if folder else M2R2(path, decoder.target, vocab)
        drafters.append((M2R2Drafter if path.segments else PaperM2R2Drafter)(network))
        drafters[-1].bind(decoder.target)
    for row, costs in zip(rows, measure(decoder.target, drafters, decoder.verifier), strict=True):
        row["predicted"], row["drafts"] = predict_speedup(row["chain"], costs)


def draw(rows: list[Row], file: Path) -> None:
    """A bar over the layers that a draft runs, at the height of its agreement and of its speed."""
    figure, named = Figure(figsize=(9.5, 4.4), layout="constrained"), set[str]()
    titles = {"agreement of the first draft": ("top1",), "x plain decoding": ("predicted", "measured")}
    for axes, (title, keys) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for row, key in ((row, key) for row in rows for key in keys if key in row):
            path, trained = path_of(row["shape"]), bool(row["drafter"])
            solid, y = key == "measured" or (key == "top1" and trained), row[key][0] if key == "top1" else row[key]
            kind = (path.exit_layer > 0) + 2 * bool(path.segments)
            form = ("", "early layers (m2r2-paper)", "late layers (m2r2)", "early and late layers")[kind]
            label = ", ".join((form, "trained" if trained else "closed form", *(() if key == "top1" else (key,))))
            for lo, hi in path.stages:
                width, style = 3 if trained else 1.2, "-" if solid else (0, (2, 1))
                axes.plot((lo, hi), (y, y), linewidth=width, linestyle=style, color=f"C{kind}")
            dot, inside = "os"[trained], f"C{kind}" if solid else "white"
            axes.plot(path.end, y, dot, color=f"C{kind}", mfc=inside, label="" if label in named else label)
            named.add(label)
        axes.set(xlabel="layers that a draft runs", ylabel=title, xlim=(0, 28.5))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shapes", default="", help="fit these")
    parser.add_argument("--prompts", type=Path, default=(), nargs="*", help="answers to fit and test them on")
    parser.add_argument("--drafters", default="", help="folders")
    parser.add_argument("--costs", action="store_true", help="time all rows, and predict speeds")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--draw", type=Path, help="a picture of the output")
    args = parser.parse_args()
    rows: list[Row] = json.loads(args.output.read_text()) if args.output.exists() else []
    rows += [trained(folder) for folder in filter(None, args.drafters.split(","))]
    if args.shapes:
        answers = [each for each in data.read(args.prompts) if isinstance(each, data.TrainingAnswer)]
        rows += fitted(args.model, args.shapes.split(","), answers)
    if args.costs:
        predict(args.model, rows)
    args.output.write_text(json.dumps(rows, indent=1))
    if args.draw:
        draw(rows, args.draw)


if __name__ == "__main__":
    main()
