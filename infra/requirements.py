#!/usr/bin/env python3
"""Print the requirements in pyproject.toml, one per line: `requirements.py [EXTRA...]`.

The image's layer of dependencies depends on this output only, so that a change of the farm's code does not rebuild it.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
print("\n".join([*project["dependencies"], *(requirement for extra in extras for requirement in extra)]))
