"""Submitting files and options as jobs in SQL, through the client and the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.client.farm import Farm
from farm.errors import InvalidInput
from farm.settings import Settings
from tests.integration.conftest import Command
from tests.servers import BOTH_KINDS_IN_TIME


@pytest.fixture
def farm(settings: Settings) -> Iterator[Farm]:
    with Farm(settings) as farm:
        yield farm


def test_a_file_a_template_a_grid_and_seeds_make_jobs_in_their_order(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "animals.csv"
    path.write_text("animal,style\ncat,oil\ndog,ink\n")
    options = {"template": "a {animal} in {style}", "grid": {"steps": [2, 3]}, "seeds": range(2)}
    found = farm.dry_run(path, **options)
    assert (found.count, found.device_seconds, found.unmeasured) == (8, None, ("tiny",))
    assert farm.batches() == []
    batch = farm.submit(path, **options)
    made = [(job.spec.prompt, job.spec.num_inference_steps, job.spec.seed) for job in batch]
    assert made == [
        (f"a {what}", steps, seed) for what in ("cat in oil", "dog in ink") for steps in (2, 3) for seed in (0, 1)
    ]


def test_a_bad_row_after_thousands_leaves_nothing(farm: Farm) -> None:
    def rows() -> Iterator[object]:
        yield from (f"prompt {n}" for n in range(3000))
        yield {"prompt": "bad", "seed": -1}

    with pytest.raises(InvalidInput, match="spec 3001: seed"):
        farm.submit(rows())
    with pytest.raises(InvalidInput, match="nothing to render"):
        farm.submit([])
    assert farm.batches() == []


@BOTH_KINDS_IN_TIME
def test_the_command_line_varies_shows_and_submits(farm: Farm, command: Command, tmp_path: Path) -> None:
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "animal.txt").write_text("cat\n")
    (tmp_path / "p.txt").write_text("a __animal__ {on a mat|}\nb\n")
    options = ["submit", "p.txt", "--grid", "steps=2,3", "guidance=5,7.5", "--seeds", "0..1", "--wildcards"]
    done = command(*options, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "16 pictures; nothing was submitted" in done.stdout
    assert "tiny unknown: nothing rendered yet with this model" in done.stdout
    assert farm.batches() == []
    shown = json.loads(command(*options, "--dry-run", "--json").stdout)
    assert (shown["count"], len(shown["first"])) == (16, 10)
    assert command(*options, "--name", "all").returncode == 0
    made = [job.spec for job in farm.batch("all")]
    asked = set(shown["first"][0])
    assert [spec.model_dump(include=asked) for spec in made[:10]] == shown["first"]
    assert [(s.prompt.startswith("a cat"), s.num_inference_steps, s.guidance_scale, s.seed) for s in made] == [
        (a, steps, guidance, seed)
        for a in (True, False)
        for steps in (2, 3)
        for guidance in (5, 7.5)
        for seed in (0, 1)
    ]


@BOTH_KINDS_IN_TIME
def test_the_command_line_says_how_much_is_wrong(farm: Farm, command: Command, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": 5}\n' * 1500)
    done = command("submit", "p.jsonl")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == ["farm: … and 500 more", "farm: 1,500 problems; nothing was submitted"]
    done = command("submit", "a", "--grid", "steps=0", "--seeds", "x", "--priority", "500")
    assert done.returncode == 2
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
        "priority",
        "grid",
        "seeds",
        "3 problems; nothing was submitted",
    ]
    assert farm.batches() == []
