"""The embedded farm of `farm up`: its parts, its files and its checks."""

from farm.local.embedded_farm import LocalFarm
from farm.local.home import running

__all__ = ["LocalFarm", "running"]
