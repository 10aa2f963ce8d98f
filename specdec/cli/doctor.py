"""``specdec doctor`` and ``drafters``: what is installed here. They load no model and download nothing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.base import files, machine, terminal
from specdec.base.errors import SpecDecError
from specdec.cli.shared import print_json
from specdec.models.catalogue import EMBEDDED, shipped_drafters
from specdec.models.prepare import embedded_folder
from specdec.speculation import registry

PACKAGES = ("specdec-m2r2", "torch", "transformers", "numpy", "safetensors", "gguf", "accelerate", "ray")
FLAGS = ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"]
FLAGS += ["amx_bf16", "amx_int8", "asimddp", "i8mm"]
# A fixed list without secrets, because reports are published.
VARIABLES = ["CUDA_VISIBLE_DEVICES", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT", "HF_HOME", "HF_HUB_OFFLINE"]
VARIABLES += ["OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "OMP_WAIT_POLICY"]
VARIABLES += ["SPECDEC_CACHE", "SPECDEC_DATA", "SPECDEC_DEBUG", "SPECDEC_NATIVE"]


def collect() -> dict[str, Any]:
    """Return the report of ``specdec doctor`` as JSON values; None or empty where the system reports nothing.

    Keys: versions {package: version}, commit (of git), system, cpu, kernels (the native ones), device, threads, cache
    and data (the two folders), models {embedded model: whether it is in the cache}, shipped_drafters {drafter: models}
    and variables (of the environment, without secrets).
    """
    from specdec.base import cores  # these import torch
    from specdec.bench.environment import environment

    machine = environment()
    return {
        "versions": _versions(),
        "commit": machine["commit"],
        "system": machine["system"],
        "cpu": {"name": machine["cpu"], "memory_gb": machine["memory_gb"], "features": _features()},
        "kernels": _kernels(),
        "device": _device(),
        "threads": {"used": cores.threads(), "cpus": cores.cpus()},
        "cache": _folder(files.cache_dir(), files.CACHE),
        "data": _folder(files.data_dir(), files.DATA),
        "models": {name: embedded_folder(name) is not None for name in EMBEDDED},
        "shipped_drafters": shipped_drafters(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def doctor(as_json: AsJson = False) -> None:
    """Print what a bug report needs: versions, CPU features, kernels, device, threads, cache, models, drafters."""
    if as_json:
        print_json(collect())
        return
    import yaml

    print(yaml.safe_dump(collect(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=120), end="")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _features(cpuinfo: Path = machine.CPUINFO) -> list[str]:
    """Return the instruction sets of ``FLAGS`` that Linux reports in the file ``cpuinfo``; [] without the file."""
    found = machine.features(cpuinfo)
    return [flag for flag in FLAGS if flag in found]


def _kernels() -> dict[str, Any]:
    from specdec.runtimes.native import library

    try:
        level = library.load().level
    except SpecDecError as error:
        return {"built": library.LIBRARY.exists(), "usable": False, "reason": str(error), "instructions": ""}
    return {"built": True, "usable": True, "reason": "", "instructions": level}


def _device() -> dict[str, str]:
    """Return {"name": the device that ``auto`` chooses, "no_cuda": why it is no CUDA device, or ""}."""
    import torch

    from specdec.models import loading

    try:
        return {"name": f"cuda ({torch.cuda.get_device_name(loading.find_device('cuda'))})", "no_cuda": ""}
    except SpecDecError as error:
        return {"name": "cpu", "no_cuda": str(error)}


def _folder(folder: Path, parts: Iterable[str]) -> dict[str, Any]:
    """Return {"folder": its path, "exists", "parts": {name: bytes}, "bytes": their sum, "free_bytes": on its disk}.

    parts: names of files and folders in it, of which "parts" has those that exist.
    """
    sizes = {name: files.size_of(folder / name) for name in parts if (folder / name).exists()}
    there = folder.exists()
    disk = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(disk).free
    return {"folder": str(folder), "exists": there, "bytes": sum(sizes.values()), "parts": sizes, "free_bytes": free}


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def drafters(as_json: AsJson = False) -> None:
    """List the drafters: summary, training command, and the models for which one is shipped."""
    rows = [_drafter(name) for name in sorted(registry.names("drafters"))]
    if as_json:
        print_json(rows)
        return
    cells = [
        (row["name"], row["summary"], row["training"] or "not needed", ", ".join(row["shipped_for"]) or "-")
        for row in rows
    ]
    terminal.print_table(("name", "summary", "training", "shipped for"), cells)


def _drafter(name: str) -> dict[str, Any]:
    try:
        found = registry.lookup("drafters", name)
        summary, training = found.summary, found.training
    except Exception as error:  # a broken plug-in must not hide the others
        summary, training = f"cannot be loaded: {error}", None
    return {
        "name": name,
        "summary": summary,
        "training": training,
        "shipped_for": shipped_drafters().get(name, []),
    }
