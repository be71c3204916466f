"""What leaves a render while it runs: its state, so that another worker can go on from it, and how it looks."""

import io
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL.PngImagePlugin import PngInfo

from farm.errors import ErrorClass, FarmError
from farm.jobs.attempts import Attempts
from farm.jobs.records import Claim, Pace
from farm.jobs.states import Outcome
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, preview_key
from workers.engine.engine import Engine
from workers.outputs import checkpoint
from workers.render.request import Snapshot

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Held:
    """A job this worker has claimed and not ended yet."""

    claim: Claim
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when somebody wants it stopped."""
    paused: threading.Event = field(default_factory=threading.Event)
    """Set when it is to be handed back until somebody lets it go on."""
    lost: threading.Event = field(default_factory=threading.Event)
    """Set when the lease is no longer ours, or could not be renewed in time."""
    writing: threading.Lock = field(default_factory=threading.Lock)
    """Held while an object of it is written; after `ended` is set none is."""
    ended: bool = False
    renewed: float = field(default_factory=time.monotonic)
    """When its lease was asked for that it lives by."""
    pace: Pace = field(default_factory=lambda: Pace(0, None))
    """As the engine told last."""
    objects: set[str] = field(default_factory=set)
    """Keys of what lies in the object store for it and goes with it."""
    checkpointed: float = field(default_factory=time.monotonic)
    """When its state was last written down, or asked for."""
    keeping: bool = False
    """Whether it is on its way there: while the object store is away, no more states of it pile up."""
    outcome: Outcome | None = None
    """What became of this attempt, once that is recorded."""
    error_class: ErrorClass | None = None
    """What the error needs that ended it, if one did."""
    preview_vae: bool | None = None
    """How somebody wants to see it now; None while nobody does."""


class Observer:
    """Looks at running renders between their steps, and writes what it sees into the object store.

    Beside the render loop, and harmless: what can't be written is logged, and the render goes on.
    """

    def __init__(self, engine: Engine, storage: Storage, attempts: Attempts, settings: Settings) -> None:
        self._engine, self._storage, self._attempts = engine, storage, attempts
        self._checkpoint_seconds = settings.checkpoint_seconds
        self._checkpoint_steps = settings.checkpoint_steps
        self._preview_steps = settings.preview_steps
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="observer")

    def begin(self, held: Held) -> None:
        """Look at a claimed job every so many steps, if that is how checkpoints are set."""
        if self._checkpoint_steps is not None and not held.claim.spec.trajectory:
            self._look(held, self._checkpoint_steps, self._checkpoint_on)

    def beat(self, held: Sequence[Held], previews: Mapping[str, bool]) -> None:
        """Checkpoint those whose time has come, and begin to show those somebody watches; called with every beat."""
        now = time.monotonic()
        for one in held:
            wanted = previews.get(one.claim.job_id)
            begins = wanted is not None and one.preview_vae is None
            one.preview_vae = wanted
            if begins:
                self._look(one, 0, self._preview)
            due = self._checkpoint_seconds is not None and now - one.checkpointed >= self._checkpoint_seconds
            # The film of a trajectory needs every step: such a render begins anew.
            if due and not one.claim.spec.trajectory and not one.keeping:
                one.checkpointed, one.keeping = now, True
                self._look(one, 0, self._keep)

    def end(self, held: Held) -> None:
        """Write nothing more of a job, whatever is under way."""
        with held.writing:
            held.ended = True

    def forget(self, held: Held) -> None:
        """Delete what this and earlier attempts wrote of a job that has ended; raises `StorageUnavailable`."""
        self.end(held)
        claim = held.claim
        for attempt in range(1, claim.attempt):  # one that died can't have told what it wrote last
            held.objects.add(checkpoint_key(claim.batch_id, claim.index, attempt))
            held.objects.add(preview_key(claim.batch_id, claim.index, attempt))
        if held.objects:
            self._storage.delete_many(sorted(held.objects))

    def close(self) -> None:
        """Look no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def checkpoint(self, held: Held, snapshot: Snapshot) -> None:
        """Write a job's state down, for a later attempt on any worker. Logs what goes wrong."""
        claim = held.claim
        key = checkpoint_key(claim.batch_id, claim.index, claim.attempt)
        if self._put(held, key, checkpoint.pack(snapshot), "application/octet-stream"):
            try:
                if not self._attempts.record_checkpoint(claim, key):
                    return  # the next attempt may go on from what lies there; all of it is swept in the end
                if claim.checkpoint_key is not None:
                    self._storage.delete(claim.checkpoint_key)
            except FarmError as error:
                log.warning("can't record the checkpoint of job_id=%s: %s", claim.job_id, error)
            else:
                log.info("checkpointed job_id=%s attempt=%d step=%d", claim.job_id, claim.attempt, snapshot.steps_done)

    def _keep(self, held: Held, snapshot: Snapshot) -> None:
        try:
            self.checkpoint(held, snapshot)
        finally:
            held.keeping = False

    def _checkpoint_on(self, held: Held, snapshot: Snapshot) -> None:
        self.checkpoint(held, snapshot)
        self._look(held, snapshot.steps_done + (self._checkpoint_steps or 1), self._checkpoint_on)

    def _preview(self, held: Held, snapshot: Snapshot) -> None:
        claim, vae = held.claim, held.preview_vae
        if vae is None:
            return
        try:
            image, text = self._engine.picture(snapshot, vae=vae), PngInfo()
            text.add_text("step", str(snapshot.steps_done))
            text.add_text("steps", str(snapshot.spec.num_inference_steps))
            out = io.BytesIO()
            image.save(out, "PNG", pnginfo=text, compress_level=1)
            self._put(held, preview_key(claim.batch_id, claim.index, claim.attempt), out.getvalue(), "image/png")
        finally:
            self._look(held, snapshot.steps_done + self._preview_steps, self._preview)

    def _look(self, held: Held, steps_done: int, then: Callable[[Held, Snapshot], None]) -> None:
        def seen(look: Future[Snapshot]) -> None:
            # Called by the render loop, between two steps: the work is for a thread of ours.
            if look.cancelled():  # it is not in the engine yet, while its model is loaded, or is no more
                held.keeping, held.preview_vae = False, None
            elif not held.ended:
                self._pool.submit(self._safely, then, held, look.result())

        self._engine.look(held.claim.job_id, steps_done).add_done_callback(seen)

    def _safely(self, then: Callable[[Held, Snapshot], None], held: Held, snapshot: Snapshot) -> None:
        try:
            then(held, snapshot)
        except Exception:
            log.exception("can't show or keep the state of job_id=%s", held.claim.job_id)

    def _put(self, held: Held, key: str, data: bytes, content_type: str) -> bool:
        with held.writing:
            if held.ended:
                return False
            try:
                if not held.objects and not self._attempts.expect_objects(held.claim):
                    return False
                held.objects.add(key)
                self._storage.put(key, data, content_type)
            except FarmError as error:
                log.warning("can't write %s: %s", key, error)
                return False
        return True
