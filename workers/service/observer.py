"""Writes checkpoints and previews of running renders to the object store, outside the render loop."""

import io
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL.PngImagePlugin import PngInfo

from farm.errors import FarmError
from farm.jobs.attempts import Attempts
from farm.jobs.records import Claim
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, preview_key
from workers.engine.engine import Engine
from workers.outputs import checkpoint
from workers.render.request import Snapshot

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Observation:
    """The checkpoints and previews of an attempt; only the `Observer` writes its fields."""

    claim: Claim
    checkpointed_at: float
    """When its last checkpoint by time was requested, or the attempt began."""
    writing: threading.Lock = field(default_factory=threading.Lock)
    """Held while one of its objects is written; none is after `closed` is set."""
    closed: bool = False
    keys: set[str] = field(default_factory=set)
    """Of its objects in the store: they are deleted when the job ends."""
    checkpointing: bool = False
    """Whether a checkpoint by time is on its way: only one at a time, so that none pile up in an outage."""
    preview_vae: bool | None = None
    """How a person wants to see it now; None while nobody watches."""


class Observer:
    """Takes snapshots of running renders between their steps, and writes checkpoints and previews of them.

    An error is logged, and the render goes on. Its methods may be called from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        attempts: Attempts,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._storage, self._attempts, self._clock = engine, storage, attempts, clock
        self._checkpoint_seconds = settings.checkpoint_seconds
        self._checkpoint_steps = settings.checkpoint_steps
        self._preview_steps = settings.preview_steps
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="observer")
        self._open: dict[str, Observation] = {}
        self._lock = threading.Lock()

    def open(self, claim: Claim) -> Observation:
        """Observe an attempt until `close`."""
        observation = Observation(claim, self._clock())
        with self._lock:
            self._open[claim.job_id] = observation
        return observation

    def begin(self, observation: Observation) -> None:
        """Checkpoint an attempt every `checkpoint_steps`, if set; called once its request is in the engine."""
        if self._checkpoint_steps is not None and not observation.claim.spec.trajectory:
            self._after_steps(observation, self._checkpoint_steps, self._checkpoint_on)

    def observe(self, previews: Mapping[str, bool]) -> None:
        """Start due checkpoints and watched previews; called with every heartbeat.

        `previews` says for each watched job whether its previews are decoded by the VAE.
        """
        now = self._clock()
        with self._lock:
            observations = list(self._open.values())
        for observation in observations:
            wanted = previews.get(observation.claim.job_id)
            begins = wanted is not None and observation.preview_vae is None
            observation.preview_vae = wanted
            if begins:
                self._after_steps(observation, 0, self._preview)
            due = self._checkpoint_seconds is not None and now - observation.checkpointed_at >= self._checkpoint_seconds
            # The film of a trajectory needs every step: such a render is not resumed.
            if due and not observation.claim.spec.trajectory and not observation.checkpointing:
                observation.checkpointed_at, observation.checkpointing = now, True
                self._after_steps(observation, 0, self._checkpoint_once)

    def checkpoint(self, observation: Observation, snapshot: Snapshot) -> None:
        """Write a checkpoint for a later attempt on any worker; an error is logged."""
        claim = observation.claim
        key = checkpoint_key(claim.batch_id, claim.index, claim.attempt)
        if self._put(observation, key, checkpoint.pack(snapshot), "application/octet-stream"):
            try:
                if not self._attempts.record_checkpoint(claim, key):
                    return  # the next attempt may resume from this object; the sweep deletes it later
                if claim.checkpoint_key is not None:
                    self._storage.delete(claim.checkpoint_key)
            except FarmError as error:
                log.warning("can't record the checkpoint of job_id=%s: %s", claim.job_id, error)
            else:
                log.info("checkpointed job_id=%s attempt=%d step=%d", claim.job_id, claim.attempt, snapshot.steps_done)

    def close(self, observation: Observation) -> None:
        """Stop writing for an attempt; waits for the object that is being written."""
        with self._lock:
            if self._open.get(observation.claim.job_id) is observation:
                del self._open[observation.claim.job_id]
        with observation.writing:
            observation.closed = True

    def delete_leftovers(self, observation: Observation) -> None:
        """Close it, and delete the objects of this and earlier attempts; raises `StorageUnavailable`."""
        self.close(observation)
        claim = observation.claim
        for attempt in range(1, claim.attempt):  # a worker that died may not have recorded its last checkpoint
            observation.keys.add(checkpoint_key(claim.batch_id, claim.index, attempt))
            observation.keys.add(preview_key(claim.batch_id, claim.index, attempt))
        if observation.keys:
            self._storage.delete_many(sorted(observation.keys))

    def leave_to_sweep(self, observation: Observation) -> None:
        """Close it, and record that it may have left objects; raises `DatabaseUnavailable`."""
        self.close(observation)
        if observation.keys:
            self._attempts.report_leftovers(observation.claim)

    def stop(self) -> None:
        """Take no more snapshots."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _checkpoint_once(self, observation: Observation, snapshot: Snapshot) -> None:
        try:
            self.checkpoint(observation, snapshot)
        finally:
            observation.checkpointing = False

    def _checkpoint_on(self, observation: Observation, snapshot: Snapshot) -> None:
        self.checkpoint(observation, snapshot)
        self._after_steps(observation, snapshot.steps_done + (self._checkpoint_steps or 1), self._checkpoint_on)

    def _preview(self, observation: Observation, snapshot: Snapshot) -> None:
        claim, vae = observation.claim, observation.preview_vae
        if vae is None:
            return
        try:
            image, text = self._engine.preview(snapshot, vae=vae), PngInfo()
            text.add_text("step", str(snapshot.steps_done))
            text.add_text("steps", str(snapshot.spec.num_inference_steps))
            out = io.BytesIO()
            image.save(out, "PNG", pnginfo=text, compress_level=1)
            key = preview_key(claim.batch_id, claim.index, claim.attempt)
            self._put(observation, key, out.getvalue(), "image/png")
        finally:
            self._after_steps(observation, snapshot.steps_done + self._preview_steps, self._preview)

    def _after_steps(
        self, observation: Observation, steps_done: int, then: Callable[[Observation, Snapshot], None]
    ) -> None:
        """Take a snapshot after that many steps, or after the next step; process it in a thread of the observer."""

        def taken(future: Future[Snapshot]) -> None:
            # Called by the render loop between two steps: it must not wait.
            if future.cancelled():  # the request has left the engine, or waits for its model to be loaded
                observation.checkpointing, observation.preview_vae = False, None
            elif not observation.closed:
                self._pool.submit(self._safely, then, observation, future.result())

        self._engine.snapshot(observation.claim.job_id, steps_done).add_done_callback(taken)

    def _safely(
        self, then: Callable[[Observation, Snapshot], None], observation: Observation, snapshot: Snapshot
    ) -> None:
        try:
            then(observation, snapshot)
        except Exception:
            log.exception("can't show or keep the state of job_id=%s", observation.claim.job_id)

    def _put(self, observation: Observation, key: str, data: bytes, content_type: str) -> bool:
        with observation.writing:
            if observation.closed:
                return False
            try:
                if not observation.keys and not self._attempts.expect_objects(observation.claim):
                    return False
                observation.keys.add(key)
                self._storage.put(key, data, content_type)
            except FarmError as error:
                log.warning("can't write %s: %s", key, error)
                return False
        return True
