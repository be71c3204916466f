"""The variables of docker-compose.yml match .env.example; `make compose-test` runs both."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()


def assignments(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#?([A-Z0-9_]+)=(.*)$", text, re.MULTILINE))


def test_every_variable_of_the_compose_file_is_in_the_example_with_its_default() -> None:
    required = set(re.findall(r"\$\{([A-Z0-9_]+):\?", COMPOSE))
    defaults = dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", COMPOSE))
    defaults |= dict.fromkeys(re.findall(r"^ +([A-Z0-9_]+):(?: *#.*)?$", COMPOSE, re.MULTILINE), "")  # passed through
    example = assignments(EXAMPLE)
    assert {name for name, value in example.items() if f"\n{name}=" in EXAMPLE} == required
    assert {name: value for name, value in example.items() if name not in required} == defaults


def test_no_secret_has_a_default_and_each_new_environment_has_its_own() -> None:
    secrets = [name for name in assignments(EXAMPLE) if name.endswith(("PASSWORD", "KEY", "KEY_ID"))]
    assert len(secrets) == 7
    assert not re.search(rf"\$\{{({'|'.join(secrets)}):?-", COMPOSE)
    made = [assignments(subprocess.check_output(["infra/compose/new-env"], cwd=ROOT, text=True)) for _ in range(2)]
    values = [found[name] for found in made for name in secrets]
    assert len(set(values)) == 14
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in values)


def test_an_images_requirements_are_those_of_the_package() -> None:
    asked = [sys.executable, "infra/requirements.py", "flower"]
    found = subprocess.check_output(asked, cwd=ROOT, text=True).splitlines()
    assert found[-1].startswith("flower==")
    assert any(line.startswith("celery==") for line in found)
    assert not any(line.startswith("torch") for line in found)
