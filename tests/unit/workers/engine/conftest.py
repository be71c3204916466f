"""The engine over a null pipeline whose every forward waits for the test."""

from collections.abc import Iterator

import pytest

from tests.gated import Gated, running
from workers.engine.engine import Engine


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def engine(gated: Gated) -> Iterator[Engine]:
    with running(gated) as engine:
        yield engine
