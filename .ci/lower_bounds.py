"""Print the dependencies in pyproject.toml as requirements for pip, each at its lowest version.

torch keeps its range of versions, because its older builds are gigabytes.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"]
for requirement in project["dependencies"]:
    found = re.match(r"([\w.-]+)>=([\d.]+)", requirement)
    print(f"{found[1]}=={found[2]}" if found and found[1] != "torch" else requirement)
