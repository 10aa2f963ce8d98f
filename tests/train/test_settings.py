"""Settings of a run: presets, recipes, earlier names, and what is refused."""

import importlib.resources
from pathlib import Path

import pytest

from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.train.m2r2 import M2R2Settings
from specdec.train.method import lookup
from specdec.train.settings import from_mapping, load_settings


def test_recipes_of_shipped_drafters_are_presets() -> None:
    recipes = sorted((importlib.resources.files("specdec.drafters") / "pretrained").glob("*/*/train.yaml"))  # type: ignore[attr-defined]
    assert recipes
    for path in recipes:
        kind = lookup(drafter_folder.read_config(path.parent)["drafter"])
        settings = load_settings(kind.settings_class, kind.name, str(path), {})
        assert settings.prompts and (settings.minutes or settings.steps)


def test_presets_load_and_settings_are_checked(tmp_path: Path) -> None:
    settings = load_settings(M2R2Settings, "m2r2", None, {"steps": 5})
    assert settings.segments == ((20, 26),) and settings.layers_of == 30
    given = load_settings(M2R2Settings, "m2r2", None, {"segments": [[1, 2]]})
    assert given.segments == ((1, 2),) and given.layers_of is None  # not scaled to the model
    early = load_settings(M2R2Settings, "m2r2", None, {"exit_layer": 2})
    assert not early.segments and early.layers_of is None
    assert not load_settings(M2R2Settings, "m2r2", "m2r2-paper", {}).segments
    own = tmp_path / "own.yaml"
    own.write_text("relative_rate: 1e-5\nsegments: [[1, 2]]\nfinal_projection: true\n")
    settings = load_settings(M2R2Settings, "m2r2", str(own), {"rank": 3, "seed": None})
    assert (settings.relative_rate, settings.segments, settings.rank) == (1e-5, ((1, 2),), 3)
    for values, message in (
        ({"relativ_rate": 1.0}, "did you mean 'relative_rate'"),
        ({"rank": "many"}, "rank must be a valid integer"),
        ({"rows": 0}, "rows must be greater than 0; got 0"),
        ({"warmup": 0}, "warmup must be greater than 0; got 0"),
        ({"draft_vocab": -1}, "draft_vocab must be greater than or equal to 0; got -1"),
        ({"clip": float("nan")}, "clip must be a finite number; got nan"),
        ({"rows": True}, "rows: it does not take true or false; got True"),
        ({"segments": [[1, "a"]]}, "segments"),
        ({"steps": 3}, "either minutes or steps"),
    ):
        with pytest.raises(SpecDecError, match=message):
            from_mapping(M2R2Settings, values, "test")
    own.write_text("segments: [[1, 2]]\nsteps: 40\nminutes: null\n")
    longer = load_settings(M2R2Settings, "m2r2", str(own), {"minutes": 2.0})
    assert (longer.minutes, longer.steps) == (2.0, None)
    with pytest.raises(SpecDecError, match="either minutes or steps"):
        load_settings(M2R2Settings, "m2r2", str(own), {"minutes": 2.0, "steps": 3})
    with pytest.raises(SpecDecError, match="did you mean 'm2r2-paper'"):
        load_settings(M2R2Settings, "m2r2", "m2r2-papr", {})
