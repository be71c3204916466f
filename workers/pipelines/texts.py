"""What is made of texts and kept: their embeddings, what cross-attention makes of those, and what was cut off."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

Embedding = Mapping[str, torch.Tensor]
"""What the denoiser is told about one text: its keyword arguments, each (1, …). Nobody may write to it."""

MOST_BYTES = 2**30
"""How much device memory the embeddings of one model may take: a text of Flux alone is some megabytes."""


class Embeddings:
    """The embeddings of the texts used last, and what was left out of each.

    Many threads may ask at once; one text is embedded at a time.
    """

    def __init__(self, most: int, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[tuple[str, Hashable], tuple[Embedding, list[str]]] = OrderedDict()
        self._bytes = 0
        self._lock, self._making = threading.Lock(), threading.Lock()
        self.hits = self.misses = 0

    def get(
        self, text: str, how: Hashable, make: Callable[[], tuple[Embedding, list[str]]]
    ) -> tuple[Embedding, list[str]]:
        """A text's embedding, made in one of several ways, unless it is here already."""
        key = (text, how)
        if (kept := self._find(key)) is not None:
            return kept
        # A tokenizer keeps the last call's padding and truncation: two calls at once get each other's.
        with self._making:
            if (kept := self._find(key)) is not None:
                return kept
            made = make()
            with self._lock:
                self.misses += 1
                if self._most:
                    self._keep(key, made)
        return made

    def _find(self, key: tuple[str, Hashable]) -> tuple[Embedding, list[str]] | None:
        with self._lock:
            if key not in self._kept:
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]

    def _keep(self, key: tuple[str, Hashable], made: tuple[Embedding, list[str]]) -> None:
        self._kept[key] = made
        self._bytes += _bytes(made[0])
        # The empty prompt is most people's negative: it never leaves.
        leaving = [kept for kept in self._kept if kept[0] and kept != key]
        while leaving and (len(self._kept) > self._most or self._bytes > self._most_bytes):
            self._bytes -= _bytes(self._kept.pop(leaving.pop(0))[0])


def _bytes(embedding: Embedding) -> int:
    return sum(tensor.nbytes for tensor in embedding.values())


def left_out(pipe: Any, text: str, limits: Mapping[str, int]) -> list[str]:
    """What each tokenizer of a pipeline cuts off a text, as the end of a warning.

    A tokenizer's own limit holds unless `limits` has another by its name.
    """
    cuts = []
    for number in ("", "_2", "_3"):
        tokenizer = getattr(pipe, f"tokenizer{number}", None)
        if tokenizer is None:
            continue
        limit = limits.get(f"tokenizer{number}", tokenizer.model_max_length)
        rest = tokenizer(text, truncation=True, max_length=limit, return_overflowing_tokens=True).input_ids[1:]
        if rest:
            words = tokenizer.decode([token for row in rest for token in row], skip_special_tokens=True)
            encoder = f" for text_encoder{number}" if number else ""
            cuts.append(f"was cut at {limit} tokens{encoder}; left out: {words:.200}")
    return cuts


class _Remembering(torch.nn.Module):
    """A layer that gives back its last output while it is called with the very same tensor."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._last: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        seen, output = self._last
        if seen is not inputs or output is None:
            output = self.layer(inputs)
            self._last = (inputs, output)
        return output


def remember_texts(denoiser: torch.nn.Module) -> None:
    """Let cross-attention make its keys and values once for as long as the same requests share forwards.

    They depend on the texts alone; of a small model's forward on the CPU they are an eighth.
    """
    from diffusers.models.attention_processor import Attention  # here, since it takes seconds, and workers import this

    for module in denoiser.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            module.to_k, module.to_v = _Remembering(module.to_k), _Remembering(module.to_v)
