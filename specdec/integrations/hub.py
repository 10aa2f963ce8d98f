"""Publish a drafter folder as a Hugging Face repository, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from specdec.base import inputs
from specdec.base.errors import SpecDecError, one_line
from specdec.models import drafter_folder, hub

CARD, RECIPE = "README.md", "train.yaml"


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a drafter folder; return the commit's URL. Raises SpecDecError for another folder or a failed upload."""
    named = hub.parse_repo_id(repository)
    if named is None or named[1] is not None:
        raise SpecDecError(f"a repository is ORG/NAME; got '{repository}'")
    config = drafter_folder.read_config(folder)
    files: dict[str, Any] = {path.name: path for path in drafter_files(folder)}
    files[CARD] = folder / CARD if (folder / CARD).is_file() else card(folder, config, repository).encode()
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repository, operations, commit_message=f"{config['drafter']} drafter")
    except LocalTokenNotFoundError:
        raise SpecDecError("pushing needs a Hugging Face token; run 'hf auth login'") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; run 'hf auth login' with a token that can write there" if status in (401, 403) else ""
        raise SpecDecError(f"Hugging Face refuses '{repository}' (HTTP {status}){hint}") from None
    except Exception as error:  # no network, ...; the type depends on the HTTP library
        raise SpecDecError(f"cannot push to '{repository}' ({one_line(error)})") from None
    return str(done.commit_url)


def drafter_files(folder: Path) -> list[Path]:
    """The files of a drafter folder to publish. Raises SpecDecError if its weights are missing or broken."""
    with drafter_folder.open_tensors(folder / drafter_folder.WEIGHTS):
        names = drafter_folder.CONFIG, drafter_folder.WEIGHTS, RECIPE
    return [folder / name for name in names if (folder / name).is_file()]


def card(folder: Path, config: dict[str, Any], repository: str) -> str:
    """The model card of a drafter folder."""
    base, training, recipe = config.get("base", {}), config.get("training", {}), _recipe(folder / RECIPE)
    held_out = training.get("held_out", {})
    name = str(base.get("name", "unknown"))
    tags = ["specdec", "speculative-decoding", config["drafter"]]
    top: dict[str, Any] = {"library_name": "specdec", "tags": tags}
    if hub.parse_repo_id(name):
        top["base_model"] = name
    rows = {
        "drafter": f"`{config['drafter']}`",
        "base model": name,
        "fingerprint of its weights": f"`{base.get('fingerprint', 'unknown')}`",
        "trained on": ", ".join(Path(str(each)).name for each in (*recipe.get("prompts", ()), *recipe.get("text", ()))),
        "answers": training.get("answers"),
        "tokens seen": training.get("tokens_seen"),
        "minutes": training.get("minutes"),
        "tokens accepted of held-out drafts": _shares(held_out.get("top1")),
        "speed on the training machine": f"{held_out['speedup']} x plain" if "speedup" in held_out else None,
        "training machine": training.get("machine"),
    }
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items() if value not in (None, ""))
    return (
        f"---\n{yaml.safe_dump(top, sort_keys=False)}---\n\n# {repository.rpartition('/')[2]}\n\n"
        f"A drafter for speculative decoding. It changes the speed of the base model and not its text.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f'```bash\nspecdec generate "Why is the sky blue?" --model {_cell(name)} --drafter {repository}\n```\n\n'
        "It fits the model with that fingerprint, in any precision. specdec refuses it for another model.\n"
    )


def _recipe(path: Path) -> dict[str, Any]:
    """The settings of the training; empty without a recipe."""
    if not path.is_file():
        return {}
    found = inputs.read_yaml(path)
    return found if isinstance(found, dict) else {}


def _shares(values: Any) -> str | None:
    return ", ".join(f"{value:.0%}" for value in values) if isinstance(values, list) else None


def _cell(value: Any) -> str:
    """Text for one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
