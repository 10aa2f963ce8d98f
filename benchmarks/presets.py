"""One preset on models of other shapes: `m2r2` from its closed form, at several factors on its learning rate.

    python benchmarks/presets.py --text FILE... --output DIR [--minutes 1] [--factors 0.25 1 4]

Small models of GPT-2's, Gemma 3's and Phi's architecture are made here: each learns the text for some minutes, byte
pairs and all, and a drafter is then trained for it with the preset as it is, on the same text. A rate that transfers is
at its best near factor 1 for all of them, and never ends below the closed form. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from specdec.train.m2r2_settings import M2R2Settings
from specdec.train.settings import load_settings
from specdec.train.trainer import train

VOCABULARY, CONTEXT, ROWS, WINDOW = 1024, 512, 16, 128
WIDE: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 192, "n_layer": 12, "n_head": 4, "n_positions": CONTEXT},
    "gemma3_text": {**WIDE, "num_key_value_heads": 2, "head_dim": 48, "sliding_window": 64},
    "phi": WIDE,
}


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def make(shape: str, texts: list[str], folder: Path, minutes: float) -> float:
    """Train a model of this shape on the text and write it; returns its last losses' mean."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(texts)
    ids = torch.tensor(tokenizer("\n".join(texts), verbose=False).input_ids)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **special, **SHAPES[shape]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, end = list[float](), time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        starts = torch.randint(len(ids) - WINDOW, (ROWS,))
        rows = torch.stack([ids[start : start + WINDOW] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(losses[-20:]) / len(losses[-20:])


def drafted(model: Path, texts: list[str], output: Path, factor: float, minutes: float) -> tuple[float, float]:
    """Tokens a step of four drafts on held-out text: of the closed form, and of the trained drafter."""
    rate = load_settings(M2R2Settings, "m2r2", None, {}).relative_rate * factor
    given = {"model": str(model), "text": texts, "output": str(output), "minutes": minutes, "relative_rate": rate}
    train(load_settings(M2R2Settings, "m2r2", None, given), console=Console(stderr=True))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    scores = [line["evaluation"]["score"] for line in lines if "evaluation" in line]
    return scores[0], scores[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files of plain text, some hundred kilobytes")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--factors", nargs="+", type=float, default=[0.25, 1.0, 4.0])
    parser.add_argument("--minutes", type=float, default=1.0, help="of training each drafter")
    parser.add_argument("--model-minutes", type=float, default=3.0, help="of training each model")
    args = parser.parse_args()
    texts = [Path(file).read_text("utf-8") for file in args.text]
    rows = list[dict[str, Any]]()
    print("| shape | loss of the model | factor on the rate | closed form | trained |")
    print("|---|---|---|---|---|")
    for shape in args.shapes:
        folder = args.output / shape
        loss = make(shape, texts, folder, args.model_minutes)
        for factor in args.factors:
            before, after = drafted(folder, args.text, args.output / f"{shape}-{factor:g}", factor, args.minutes)
            rows.append({"shape": shape, "loss": loss, "factor": factor, "closed": before, "trained": after})
            print(f"| {shape} | {loss:.2f} | {factor:g} | {before:.2f} | {after:.2f} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
