"""The embedded farm: what `farm up` starts, and whether it runs."""

from farm.local.embedded_farm import LocalFarm
from farm.local.home import running

__all__ = ["LocalFarm", "running"]
