"""Print pip constraints that hold the dependencies of pyproject.toml, but torch, at their lower bounds."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"]
for requirement in project["dependencies"]:
    found = re.match(r"([\w.-]+)>=([\d.]+)", requirement)
    if found and found[1] != "torch":
        print(f"{found[1]}=={found[2]}")
