"""The models that a worker keeps loaded, within a memory budget."""

import logging
import math
import threading
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Self

import torch

from farm.errors import FarmError, ModelError, ModelUnavailable
from workers.render.device import free_memory
from workers.render.pipeline import Pipeline

log = logging.getLogger(__name__)

_TEMPORARY_SECONDS = 5.0
"""How long a model is refused after its object store was away, or after it found no memory."""


class Pins:
    """The models that a worker serves: loaded in the given order up to the memory budget, evicted by least recent use.

    All methods may be called from any thread; users of a loaded model never wait for a load. Loads are served in
    order of arrival. A model to be evicted accepts no new users until the load that evicts it is done.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        load: Callable[[str, str], Pipeline],
        memory_bytes: int | None = None,
        size: Callable[[str], int] | None = None,
        retry_seconds: float = 60.0,
    ) -> None:
        """Serve {name: source}, each loaded by `load(name, source)`; loads nothing yet.

        `memory_bytes` limits the parameters of all loaded models together; None leaves that to the device.
        `size(source)` estimates the bytes of a model before its first load, so that others are evicted before it. A
        model that can't be loaded is refused for `retry_seconds`, or for a few seconds if the error is temporary.
        """
        self._sources = dict(sources)
        self.names = tuple(sources)
        """All models, loaded or not, in the order given."""
        self._load = load
        self._budget = math.inf if memory_bytes is None else memory_bytes
        self._size = size
        self._retry_seconds = retry_seconds
        self.loads = 0
        self.evictions = 0
        # Guards all attributes, and is free while a model loads. Only the head of the queue loads and evicts.
        self._changed = threading.Condition()
        self._held: OrderedDict[str, Pipeline] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()
        self._leaving: frozenset[str] = frozenset()  # still in use, but closed to new users
        self._line: dict[str, list[Future[Pipeline]]] = {}  # the waiting users of each model, in order of arrival
        self._sizes: dict[str, int] = {}  # of each model that has been loaded once
        self._failures: dict[str, tuple[str, type[ModelError], float]] = {}  # reason, kind of error, until when

    @classmethod
    def of(cls, pipelines: Mapping[str, Pipeline]) -> Self:
        """Pins of pipelines that are already loaded."""
        pins = cls(dict.fromkeys(pipelines, ""), lambda name, _: pipelines[name])
        pins.load_all()
        return pins

    def load_all(self) -> None:
        """Load each model that fits beside the earlier ones; load the others at their first use.

        Call it before the first `use`. If no model can be loaded it raises `ModelError` with the reason for each, or
        `ModelUnavailable` if a later try may succeed.
        """
        for name in self._sources:
            with suppress(ModelError):
                if not self._bring(name, evict=False):
                    log.info("no room for model=%s beside %s: left until it is used", name, ",".join(self.held))
                    free_memory()
        if not self._held:
            kinds = [kind for _, kind, _ in self._failures.values()]
            kind = ModelUnavailable if ModelUnavailable in kinds else ModelError
            raise kind("\n".join(f"model {name!r}: {why}" for name, why in self.failures.items()))

    @property
    def held(self) -> tuple[str, ...]:
        """The loaded models, most recently used first."""
        with self._changed:
            return tuple(reversed(self._held))

    @property
    def failures(self) -> Mapping[str, str]:
        """The reason why each model could not be loaded, until it is loaded."""
        with self._changed:
            return {name: why for name, (why, _, _) in self._failures.items()}

    @property
    def memory_used(self) -> dict[str, int]:
        """The bytes of parameters, by loaded model."""
        with self._changed:
            return {name: self._sizes[name] for name in self._sources if name in self._held}

    def use(self, name: str) -> Pipeline:
        """The pipeline of a model, kept loaded until `release`; keep no reference to it after that.

        Loads the model if necessary: it evicts others, least recently used first, and waits for those in use, so a user
        of a model must not wait for another model. Raises `ModelUnavailable` for a temporary failure, and `ModelError`
        for a model that is not served here, can't be loaded, or exceeds the budget by itself.
        """
        with self._changed:
            if name not in self._sources:
                raise ModelError(f"model {name!r} is not served here; served: {', '.join(self._sources) or 'none'}")
            if name in self._held and name not in self._leaving:
                return self._enter(name)
            why, kind, until = self._failures.get(name, ("", ModelError, -math.inf))
            if time.monotonic() < until:
                raise kind(f"model {name!r}: {why}")
            waiting = self._line.setdefault(name, [])
            loaded = Future[Pipeline]()
            waiting.append(loaded)
        if waiting[0] is loaded:
            self._take(name)
        return loaded.result()

    def release(self, name: str) -> None:
        """End one use of a model. Raises `ValueError` if it has none."""
        with self._changed:
            if not self._users[name]:
                raise ValueError(f"nobody uses model {name!r}")
            self._users[name] -= 1
            self._changed.notify_all()

    @contextmanager
    def using(self, name: str) -> Iterator[Pipeline]:
        """`use` a model, and `release` it at the end of the block."""
        pipeline = self.use(name)
        try:
            yield pipeline
        finally:
            self.release(name)

    def _enter(self, name: str) -> Pipeline:
        self._users[name] += 1
        self._held.move_to_end(name)
        return self._held[name]

    def _take(self, name: str) -> None:
        """Wait for a model's turn, load it, and give it to all waiting users before the next load can evict it."""
        error: BaseException | None = None
        try:
            with self._changed:
                self._changed.wait_for(lambda: next(iter(self._line)) == name)
            if name not in self._held:  # still loaded: its eviction became unnecessary
                self._bring(name, evict=True)
        except BaseException as caught:  # noqa: BLE001 - raised by the futures, in every thread that waits
            error = caught
        with self._changed:
            for loaded in self._line.pop(name):
                loaded.set_exception(error) if error else loaded.set_result(self._enter(name))
            self._changed.notify_all()

    def _bring(self, name: str, *, evict: bool) -> bool:
        """Load a model; False if it does not fit and `evict` is not set.

        Every error is a `ModelError`, and the model is refused for a while.
        """
        try:
            return self._fits(name, evict=evict)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            why = str(error) if isinstance(error, FarmError) else f"{type(error).__name__}: {error}"
            temporary = isinstance(error, torch.OutOfMemoryError) or (isinstance(error, FarmError) and error.retryable)
            kind = ModelUnavailable if temporary else ModelError
            refused_seconds = min(self._retry_seconds, _TEMPORARY_SECONDS) if temporary else self._retry_seconds
            with self._changed:
                self._failures[name] = why, kind, time.monotonic() + refused_seconds
            free_memory()
            log.warning("can't pin model=%s: %s", name, why, exc_info=not isinstance(error, FarmError))
            raise kind(f"model {name!r}: {why}") from error

    def _fits(self, name: str, *, evict: bool) -> bool:
        pipeline = None
        while pipeline is None:
            if not self._make_room(name, evict):
                return False
            began = time.monotonic()
            try:
                pipeline = self._open(name)
                seconds = time.monotonic() - began
            except torch.OutOfMemoryError as error:
                if not evict and self._held:
                    return False
                traceback.clear_frames(error.__traceback__)  # frees what was loaded so far
                if not self._evict_unused():
                    raise
        if not self._make_room(name, evict):  # its size was unknown, or underestimated
            return False
        with self._changed:
            self._held[name] = pipeline
            self._failures.pop(name, None)
        log.info("pinned model=%s bytes=%d seconds=%.1f", name, pipeline.nbytes, seconds)
        return True

    def _open(self, name: str) -> Pipeline:
        pipeline = self._load(name, self._sources[name])
        self._sizes[name] = pipeline.nbytes
        self.loads += 1
        self._refuse_too_large(name)
        return pipeline

    def _refuse_too_large(self, name: str) -> None:
        if (nbytes := self._sizes.get(name, 0)) > self._budget:
            raise ModelError(f"its {nbytes:,} bytes are more than the {self._budget:,} allowed, even alone")

    def _make_room(self, name: str, evict: bool) -> bool:
        """Whether a model fits beside the loaded ones; with `evict`, evict and wait until it does."""
        self._refuse_too_large(name)
        needed: float = self._sizes.get(name, 0)
        if name not in self._sizes and self._size:
            needed = min(self._size(self._sources[name]), self._budget)  # an estimate must not refuse a model
        with self._changed:
            while (excess := sum(self.memory_used.values()) + needed - self._budget) > 0 and evict:
                if not self._evict_unused():
                    freed_before = accumulate((self._sizes[other] for other in self._held), initial=0)
                    chosen = (other for other, freed in zip(self._held, freed_before, strict=False) if freed < excess)
                    self._leaving = frozenset(chosen)
                    self._changed.wait()
            self._leaving = frozenset()
            return excess <= 0

    def _evict_unused(self) -> bool:
        """Evict the least recently used of the unused models; False if all are in use."""
        with self._changed:
            name = next((name for name in self._held if not self._users[name]), None)
            if name is None:
                return False
            del self._held[name]
            self.evictions += 1
        free_memory()
        log.info("unpinned model=%s bytes=%d", name, self._sizes[name])
        return True
