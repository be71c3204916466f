"""A worker's leases on jobs: claimed, renewed with every heartbeat, given up before they expire."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from farm.errors import ServiceUnavailable
from farm.jobs.leases import Leases
from farm.jobs.records import Beat, Claim, Pace
from farm.runtime.periodic import Periodic
from farm.settings import Settings
from workers.render.request import Progress
from workers.service.group_commit import GroupCommit

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Lease:
    """The right to render one attempt of a job; only `HeldLeases` writes its fields."""

    claim: Claim
    renewed_at: float
    """When its last successful renewal was requested, by the clock of `HeldLeases`."""
    pace: Pace = field(default_factory=lambda: Pace(0, None))
    """The progress that the last renewal reported."""
    cancelled: bool = False
    """Whether the job is to be cancelled."""
    paused: bool = False
    """Whether the job is paused, and is to be handed back."""
    lost: bool = False
    """Whether the lease belongs to another worker now, or could not be renewed in time."""


class HeldLeases:
    """The leases of one worker. Its methods may be called from any thread.

    `progress`, `cancel` and `hand_back` are the engine's. `previews` is called with every heartbeat, with the watched
    jobs of this worker: for each job id, whether its previews are to be decoded by the VAE.
    """

    def __init__(
        self,
        jobs: Leases,
        worker: str,
        settings: Settings,
        *,
        progress: Callable[[], Mapping[str, Progress]],
        cancel: Callable[[str], object],
        hand_back: Callable[[str, str], object],
        previews: Callable[[Mapping[str, bool]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs, self._worker = jobs, worker
        self._lease_seconds, self._beat_seconds = settings.lease_seconds, settings.beat_seconds
        self._progress, self._cancel, self._hand_back, self._previews = progress, cancel, hand_back, previews
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._lock = threading.Lock()
        self._claims = GroupCommit(self._claim_all, "claims")
        self._heartbeat = Periodic("heartbeat", self._beat_seconds, self.renew)
        # In a separate thread: a hung database can block a heartbeat for long.
        self._guard = Periodic("leases", self._beat_seconds / 4, self.stop_expiring)

    def start(self) -> None:
        """Renew the leases every `beat_seconds` from now on."""
        self._heartbeat.start()
        self._guard.start()

    def stop(self) -> None:
        """Stop renewing leases."""
        self._guard.stop()
        self._heartbeat.stop(self._beat_seconds + 5)

    def claim(self, job_id: str) -> Lease | None:
        """Claim a job and renew its lease until `release`; None if it can't be claimed."""
        asked = self._clock()
        claim = self._claims(job_id)
        if claim is None:
            return None
        lease = Lease(claim, asked)
        if self._clock() - asked > self._beat_seconds:
            self._renew([lease])  # the database hung: by `asked` the lease would be too old
        with self._lock:
            self._leases[job_id] = lease
        return lease

    def release(self, lease: Lease) -> None:
        """Stop renewing a lease: its attempt has ended."""
        with self._lock:
            if self._holds(lease):
                del self._leases[lease.claim.job_id]

    @contextmanager
    def renders(self) -> Iterator[Mapping[tuple[str, int], Progress]]:
        """The progress of each render, by job id and attempt; their leases are not released within the block."""
        progress = self._progress()
        with self._lock:
            yield {
                (job_id, lease.claim.attempt): progress[job_id]
                for job_id, lease in self._leases.items()
                if job_id in progress
            }

    def renew(self) -> None:
        """One heartbeat: renew all leases, and stop the renders that are cancelled, paused or lost."""
        try:
            beat = self._renew(self._all())
        except ServiceUnavailable as error:
            log.error("can't renew leases: %s", error)
        else:
            self._previews(beat.previews)

    def stop_expiring(self) -> None:
        """Stop every render whose lease is about to expire: another worker may then get its job."""
        oldest = self._clock() - (self._lease_seconds - self._beat_seconds)
        for lease in self._all():
            if lease.renewed_at < oldest:
                if not lease.lost:
                    log.error("lease not renewed, stopping job_id=%s", lease.claim.job_id)
                self._stop(lease, cancelled=False)

    def _claim_all(self, job_ids: Sequence[str]) -> list[Claim | None]:
        claims = self._jobs.claim_many(set(job_ids), self._worker)
        return [claims.pop(job_id, None) for job_id in job_ids]  # of two messages for one job, the first claims it

    def _all(self) -> list[Lease]:
        with self._lock:
            return list(self._leases.values())

    def _holds(self, lease: Lease) -> bool:
        return self._leases.get(lease.claim.job_id) is lease

    def _renew(self, leases: Sequence[Lease]) -> Beat:
        asked = self._clock()
        progress = self._progress()
        for lease in leases:
            if seen := progress.get(lease.claim.job_id):  # else it is not in the engine
                lease.pace = Pace(seen.steps_done, seen.seconds_per_step)
        beat = self._jobs.beat(
            self._worker, {(lease.claim.job_id, lease.claim.attempt): lease.pace for lease in leases}
        )
        # A job that is not in the engine yet ignores this, so it is repeated with every heartbeat.
        for lease in leases:
            job_id = lease.claim.job_id
            if job_id in beat.lost:
                self._stop(lease, cancelled=False)
                continue
            lease.renewed_at = asked
            if job_id in beat.cancelled:
                self._stop(lease, cancelled=True)
            elif job_id in beat.paused:
                lease.paused = True
                self._hand_back(job_id, "it is paused")
        return beat

    def _stop(self, lease: Lease, *, cancelled: bool) -> None:
        with self._lock:
            if not self._holds(lease):
                return  # it ended meanwhile, and the engine may render a newer attempt of its job
            lease.cancelled |= cancelled
            lease.lost |= not cancelled
        self._cancel(lease.claim.job_id)
