"""Which version of the farm this is."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffusion-farm")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"
