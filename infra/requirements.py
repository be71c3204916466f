#!/usr/bin/env python3
"""What pyproject.toml asks for, a requirement a line: `requirements.py [EXTRA...]`.

An image's layer of dependencies is made from this alone, so that no change of the farm's own code makes it anew.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
print("\n".join([*project["dependencies"], *(requirement for extra in extras for requirement in extra)]))
