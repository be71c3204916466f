"""The texts of a request, the cache of their embeddings, and the parts of a text that its tokenizers cut off."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from farm.specs.spec import TEXT_OPTIONS, RenderSpec

Embedding = Mapping[str, torch.Tensor]
"""The denoiser's keyword arguments for one text, each (1, …). It is shared: never write to it."""

MOST_BYTES = 2**30
"""The most device memory that the embeddings of one model take: those of one text of Flux take some megabytes."""


@dataclass(frozen=True)
class Text:
    """One text of a request. Equal ones have equal embeddings, since nothing else reaches a family's `embed`."""

    text: str
    negative: bool
    options: RenderSpec
    """The text options (`farm.specs.spec.TextOption`) of the request's spec; its other fields have their defaults."""

    @classmethod
    def of(cls, spec: RenderSpec, *, negative: bool = False) -> Self:
        """The prompt of a spec, or its negative prompt."""
        options = {name: getattr(spec, name) for name in TEXT_OPTIONS}
        text = spec.negative_prompt if negative else spec.prompt
        return cls(text, negative, RenderSpec(prompt="", seed=0, **options))


class Embeddings:
    """The embeddings of the texts used last, each with the warnings about it.

    All methods may be called from any thread; one text is embedded at a time.
    """

    def __init__(self, most: int, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[Text, tuple[Embedding, list[str]]] = OrderedDict()
        self._bytes = 0
        self._lock, self._making = threading.Lock(), threading.Lock()
        self.hits = self.misses = 0

    def get(self, text: Text, make: Callable[[Text], tuple[Embedding, list[str]]]) -> tuple[Embedding, list[str]]:
        """A text's embedding and warnings: those kept, or those that `make` returns."""
        if (kept := self._find(text)) is not None:
            return kept
        # A tokenizer keeps the last call's padding and truncation: two calls at once get each other's.
        with self._making:
            if (kept := self._find(text)) is not None:
                return kept
            made = make(text)
            with self._lock:
                self.misses += 1
                if self._most:
                    self._keep(text, made)
        return made

    def _find(self, text: Text) -> tuple[Embedding, list[str]] | None:
        with self._lock:
            if text not in self._kept:
                return None
            self.hits += 1
            self._kept.move_to_end(text)
            return self._kept[text]

    def _keep(self, text: Text, made: tuple[Embedding, list[str]]) -> None:
        self._kept[text] = made
        self._bytes += _bytes(made[0])
        # Most specs have an empty negative prompt: the empty text is never evicted.
        leaving = [kept for kept in self._kept if kept.text and kept != text]
        while leaving and (len(self._kept) > self._most or self._bytes > self._most_bytes):
            self._bytes -= _bytes(self._kept.pop(leaving.pop(0))[0])


def _bytes(embedding: Embedding) -> int:
    return sum(tensor.nbytes for tensor in embedding.values())


def left_out(pipe: Any, text: str, limits: Mapping[str, int]) -> list[str]:
    """The part of a text that each tokenizer of a pipeline cuts off, as the end of a warning.

    `limits` overrides a tokenizer's own limit, by its name.
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
    """A layer that returns its last output again while it is called with the same tensor."""

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
    """Compute the keys and values of cross-attention once while the same requests share forwards.

    They depend on the texts alone, and take an eighth of a small model's forward on the CPU.
    """
    from diffusers.models.attention_processor import Attention  # here, since it takes seconds to import

    for module in denoiser.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            module.to_k, module.to_v = _Remembering(module.to_k), _Remembering(module.to_v)
