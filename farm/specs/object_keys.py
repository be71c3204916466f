"""The object store's keys of a job's objects, readable by people."""

import re
import unicodedata

_SLUG_CHARS = 48


def slug(text: str) -> str:
    """At most 48 lower-case letters, digits and hyphens of a text; may be empty.

    The result contains no slash, dot or control character, so a prompt cannot escape from its key.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG_CHARS].strip("-")


def image_key(batch_id: str, index: int, attempt: int, prompt: str) -> str:
    """`{batch}/{index}-{prompt}.a{attempt}.png`.

    The attempt in the key keeps late uploads of older attempts from replacing the current picture.
    """
    words = slug(prompt)
    return f"{batch_id}/{index:05d}{f'-{words}' if words else ''}.a{attempt}.png"


def checkpoint_key(batch_id: str, index: int, attempt: int) -> str:
    """`{batch}/{index}.a{attempt}.checkpoint.safetensors`: the state of a running render."""
    return f"{batch_id}/{index:05d}.a{attempt}.checkpoint.safetensors"


def preview_key(batch_id: str, index: int, attempt: int) -> str:
    """`{batch}/{index}.a{attempt}.preview.png`: a preview of a running render."""
    return f"{batch_id}/{index:05d}.a{attempt}.preview.png"


def trajectory_keys(image_key: str) -> tuple[str, str]:
    """The keys of a picture's film strip, `….trajectory.png`, and animation, `….trajectory.webp`."""
    stem = image_key.removesuffix(".png")
    return f"{stem}.trajectory.png", f"{stem}.trajectory.webp"


def beside(picture_key: str, other_picture_key: str, key: str) -> str:
    """The key beside one picture that corresponds to a `key` beside another one."""
    return picture_key.removesuffix(".png") + key.removeprefix(other_picture_key.removesuffix(".png"))


def manifest_key(batch_id: str) -> str:
    """`{batch}/manifest.jsonl`: one JSON line per job of a batch."""
    return f"{batch_id}/manifest.jsonl"
