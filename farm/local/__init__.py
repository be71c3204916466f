"""The embedded farm: what `farm up` starts, and how one sees whether it runs."""

from farm.local.home import running
from farm.local.supervisor import LocalFarm

__all__ = ["LocalFarm", "running"]
