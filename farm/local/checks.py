"""Checks of the embedded farm's home."""

from farm.local.home import running
from farm.runtime.finding import Finding
from farm.settings import EMBEDDED_FILE, Settings


def check_home(settings: Settings) -> Finding:
    """Check that the embedded farm runs, and that its passwords are private."""
    path = (settings.home / EMBEDDED_FILE).absolute()
    pid = running(settings.home)
    if pid is None:
        return Finding("settings", "bad", f"from {path}, but the farm there does not run", "start it: `farm up`")
    if path.stat().st_mode & 0o077:
        return Finding("settings", "warn", f"{path} holds passwords, and others can read it", f"chmod 600 {path}")
    return Finding("settings", "ok", f"from {path}, whose farm runs as process {pid}")
