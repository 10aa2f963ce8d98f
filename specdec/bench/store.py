"""The output folder of a benchmark: its plan, and one line per finished cell.

    sweep.json    name, description, settings (as YAML), commands, resources, prompts and the cells of the plan, by key
    cells.jsonl   one record per line, append-only: the result of a cell, or {"key", "cell", "error", "seconds"}
                  for a cell that failed; the last line of a key counts
    results.jsonl one request per line, append-only (``BenchRequest.as_dict``)

A line is written at once, and a record is synced. A process that is killed at any moment leaves whole lines and at most
one unfinished line at the end of a file, which the next writer cuts off.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from specdec.base.errors import SpecDecError
from specdec.base.files import write_atomically
from specdec.base.terminal import say
from specdec.bench.cell import Cell
from specdec.bench.plan import Plan

MANIFEST, RECORDS, REQUESTS, LOCK = "sweep.json", "cells.jsonl", "results.jsonl", ".lock"


def finished(record: Mapping[str, Any] | None) -> bool:
    """Return whether a record is the whole result of its cell: no error, no failed baseline, not interrupted."""
    if record is None or "error" in record or record["interrupted"]:
        return False
    return not record.get("failed_baselines")


class Store:
    """The output folder of one benchmark: its plan, and a record for each cell (measured settings) that has run.

    The folder need not exist yet. Only ``opened``, ``append`` and ``logging`` write into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / MANIFEST  # the plan
        self.path = folder / RECORDS  # the results
        self.requests = folder / REQUESTS  # every answer

    @contextmanager
    def opened(
        self, plan: Plan, command: str, resume: bool = False, prompts: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """Create the folder with ``plan`` unless it is there, add ``command`` to it, and lock it in the ``with`` block.

        command: the command line, for the report. resume: whether the folder may hold finished cells of this plan.
        prompts: name of each prompt set -> its conversations as JSON values, for the report; None: they are not kept.
        Raises SpecDecError if the folder holds another plan, other prompts, other files or, without ``resume``,
        records, and if it cannot be written or another process has locked it.
        """
        self._check(plan, resume)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK, timeout=0):
                manifest: dict[str, Any] = {
                    "name": plan.name,
                    "description": plan.description,
                    "settings": plan.settings,
                    "resources": plan.resources.model_dump(),
                    "prompts": prompts or {},
                    "cells": {cell.key(): cell.as_dict() for cell in plan.cells},
                }
                if self.manifest.is_file():
                    manifest = self.read_manifest()
                    known = manifest.get("prompts")
                    if known and prompts and known != json.loads(json.dumps(prompts)):  # tuples are lists there
                        raise SpecDecError(
                            f"'{self.folder}' holds results for other prompts: a prompt file has changed; "
                            "give another --output"
                        )
                manifest["commands"] = [*manifest.get("commands", []), command]
                text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
                write_atomically(self.manifest, text.encode(errors="backslashreplace"))
                for path in (self.path, self.requests):
                    if path.is_file():  # cut off the end that a killed process may have left
                        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
                yield
        except Timeout:
            raise SpecDecError(f"another process is writing into '{self.folder}'; wait for it or end it") from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise SpecDecError(f"cannot write to '{self.folder}': {error.strerror}; give another --output") from None

    def _check(self, plan: Plan, resume: bool) -> None:
        """Raise SpecDecError if the folder holds another plan, other files, or, without ``resume``, records."""
        keys = {cell.key() for cell in plan.cells}
        if self.manifest.is_file():
            before = self.read_manifest()
            planned = set(before["cells"])
            if planned != keys:
                raise SpecDecError(
                    f"'{self.folder}' holds other results ('{before['name']}', {len(planned)} cells; this plan has "
                    f"{len(keys)}, of which {len(keys & planned)} are the same); give another --output"
                )
            if (ended := len(self.records())) and not resume:
                raise SpecDecError(
                    f"'{self.folder}' holds these results already ({ended} of {len(keys)} cells); go on with "
                    "--resume, or give another --output"
                )
        elif self.folder.is_dir() and any(path.name != LOCK for path in self.folder.iterdir()):
            raise SpecDecError(f"'{self.folder}' is not empty and holds no results; give another --output")

    def read_manifest(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``, the plan as stored; ``cells`` is {key: ``Cell.as_dict()``}.

        Raises SpecDecError if the file is missing or unreadable.
        """
        try:
            manifest = json.loads(self.manifest.read_text("utf-8"))
            if isinstance(manifest["cells"], dict) and isinstance(manifest["name"], str):
                return dict(manifest)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        raise SpecDecError(
            f"'{self.manifest}' is broken, so its plan is unknown; delete the folder, or give another --output"
        )

    def records(self) -> dict[str, dict[str, Any]]:
        """Return {key of a cell: its last record}, {} without a file. An unfinished last line is ignored.

        Raises SpecDecError for another broken line.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        records = {}
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (ValueError, KeyError, TypeError, RecursionError):
                raise SpecDecError(
                    f"line {number} of '{self.path}' is broken; remove it and --resume repeats its cell"
                ) from None
        return records

    def waiting(self, plan: Plan) -> list[Cell]:
        """Return the cells of the plan that have not run, were interrupted, or failed, in the plan's order."""
        records = self.records()
        return [cell for cell in plan.cells if not finished(records.get(cell.key()))]

    def append(self, record: dict[str, Any]) -> None:
        """Append one record as a line of ``cells.jsonl``, and sync it to the disk. Call it only within ``opened``."""
        with self.path.open("ab") as file:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(text.encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def logging(self) -> Iterator[Callable[[Any], None]]:
        """Open ``results.jsonl`` in the ``with`` block; give a function that appends a request (JSON values) as a line.

        After a write error, such as a full disk, the function prints one line to stderr and writes no more. Use it only
        within ``opened``.
        """
        whole = True
        with self.requests.open("ab", buffering=0) as file:

            def log(request: Any) -> None:
                nonlocal whole
                if not whole:
                    return
                text = json.dumps(request, ensure_ascii=False) + "\n"
                line = text.encode(errors="backslashreplace")
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError as error:
                    whole = False
                    say(f"cannot write to '{self.requests}': {error.strerror}; the run goes on without this file")

            yield log
