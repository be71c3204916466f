"""Fixtures of the security tests: hostile texts, and a whole embedded farm to attack."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from farm.errors import NotConfigured
from farm.local import LocalFarm
from tests.servers import missing, needs_torch

HOSTILE = {
    "terminal": "\x1b[2J\x1b]0;pwned\x07 a cat \x9b31m",
    "lines": "a cat\r\n2026-01-01 00:00:00,000 ERROR farm forged\x85\u2028line",
    "letters turned round": "a \u202egnp.tac\u202c \u2066cat\u2069\u200f",
    "HTML": "<script>alert(1)</script><img src=x onerror=\"alert('1')\">&amp;",
    "formats": "{} {0} {prompt.__class__} %s %(levelname)s %n $HOME `id` [bold]cat[/bold] [/]",
    "SQL": "'; DROP TABLE jobs; -- \" OR 1=1",
    "paths": "../../../etc/passwd\\..\\..",
    "wide": "\U0001f600 日本語 \U000e0041\u0301 \uffff",
    "nothing but dots": "..",
}
"""Prompts and names that a careless reader would interpret as code, markup, paths or control characters."""


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFarm]:
    """A running farm with dispatcher, null-pipeline worker and Flower, as `farm up` starts it; its output is kept."""
    needs_torch()
    home = tmp_path_factory.mktemp("whole") / "home"
    farm = LocalFarm(home, console=Console(file=io.StringIO(), width=200))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"FARM_MODELS": "tiny=null:", "FARM_SLOTS": "2", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        try:
            farm.start()
        except NotConfigured as error:
            missing(str(error))
    yield farm
    farm.stop()
