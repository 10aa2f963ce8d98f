"""What a generation of the default model takes of memory, drafter by drafter; the last line is JSON.

    python benchmarks/memory.py --drafters none,m2r2

Each drafter runs in a process of its own. Counted is the peak resident size beyond that of a process that has imported
the libraries and read the tokenizer; beside it, what has to be there: the weights as they are held (packed layers and
head, and the embedding's rows in 16 bits), the cached keys and values, and the drafter's file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

PROMPT = "Write a long story about a lighthouse."


def resident(field: str, process: int | str = "self") -> float:
    """ "VmRSS" (now) or "VmHWM" (peak) of a process, in MB."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def one(drafter: str, weights: str, tokens: int) -> None:
    """Generate in this process and print its figures as JSON."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # the libraries' own lazy parts
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from specdec import SpecDecoder
    from specdec.models import catalogue, drafter_folder

    tokenizer = AutoTokenizer.from_pretrained(catalogue.prepared(catalogue.DEFAULT_MODEL))
    base = resident("VmRSS")
    del tokenizer
    decoder = SpecDecoder.from_pretrained(drafter=drafter, weights=weights, device="cpu")
    loaded = resident("VmRSS")
    cached = 0
    with decoder.open([PROMPT], max_new_tokens=tokens, ignore_eos=True) as generation:
        for _ in generation.steps():
            cache = generation.engine.batch.cache
            cached = max(cached, cache.slots * cache.token_bytes)
    target = decoder.target
    held = target.bytes_read + decoder.model.get_input_embeddings().weight.nbytes  # type: ignore[attr-defined]
    folder = drafter_folder.shipped(drafter, target)
    own = 0 if folder is None else (folder / "model.safetensors").stat().st_size
    need = (held + cached + own) / 1e6
    figures = {"drafter": drafter, "weights": target.storage, "libraries": base, "loaded": loaded - base}
    figures |= {"peak": resident("VmHWM") - base, "held": held / 1e6, "cache": cached / 1e6, "drafter_file": own / 1e6}
    figures["ratio"] = figures["peak"] / need
    print(json.dumps({key: round(v, 2) if isinstance(v, float) else v for key, v in figures.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafters", default="none,m2r2")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--here", action="store_true", help="measure this process (one drafter)")
    args = parser.parse_args()
    if args.here:
        one(args.drafters, args.weights, args.max_new_tokens)
        return
    table, rows = Table(title="MB beyond the libraries and the tokenizer"), []
    columns = ("drafter", "weights", "loaded", "peak", "held", "cache", "drafter_file", "ratio")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("drafter", "weights") else "right")
    for drafter in args.drafters.split(","):
        command = [sys.executable, __file__, "--here", "--drafters", drafter, "--weights", args.weights]
        command += ["--max-new-tokens", str(args.max_new_tokens)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        table.add_row(*(str(rows[-1][column]) for column in columns))
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
