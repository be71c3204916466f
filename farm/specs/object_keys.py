"""The keys of what a job leaves in the object store, readable by people."""

import re
import unicodedata

_SLUG_CHARS = 48


def slug(text: str) -> str:
    """Up to 48 lower-case letters, digits and hyphens that remind of a text; empty if nothing is left of it.

    Nothing of a prompt can leave its place in a key: no slash, dot or control character comes through.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG_CHARS].strip("-")


def image_key(batch_id: str, index: int, attempt: int, prompt: str) -> str:
    """`{batch}/{index}-{prompt}.a{attempt}.png`.

    The attempt keeps a zombie from writing over the picture of the job's rightful worker.
    """
    words = slug(prompt)
    return f"{batch_id}/{index:05d}{f'-{words}' if words else ''}.a{attempt}.png"


def checkpoint_key(batch_id: str, index: int, attempt: int) -> str:
    """`{batch}/{index}.a{attempt}.checkpoint.safetensors`: the state of a render on its way."""
    return f"{batch_id}/{index:05d}.a{attempt}.checkpoint.safetensors"


def preview_key(batch_id: str, index: int, attempt: int) -> str:
    """`{batch}/{index}.a{attempt}.preview.png`: how a render that somebody watches looks by now."""
    return f"{batch_id}/{index:05d}.a{attempt}.preview.png"


def trajectory_keys(image_key: str) -> tuple[str, str]:
    """Beside a picture: the film strip of its steps, `….trajectory.png`, and their animation, `….trajectory.webp`."""
    stem = image_key.removesuffix(".png")
    return f"{stem}.trajectory.png", f"{stem}.trajectory.webp"


def manifest_key(batch_id: str) -> str:
    """`{batch}/manifest.jsonl`: what became of each job of a batch, a JSON line a job."""
    return f"{batch_id}/manifest.jsonl"
