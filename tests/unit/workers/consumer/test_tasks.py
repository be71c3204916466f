"""The outcome of a render as a Celery task state, and its display in Flower."""

import pytest
from celery.exceptions import Ignore, Retry

from farm.errors import BadRequest, ErrorClass
from farm.jobs.states import Outcome
from workers.consumer.tasks import task_result
from workers.service.outcomes import Cancelled, Failed, HandedBack, LostLease, NothingToClaim, RenderOutcome, Succeeded


@pytest.mark.parametrize(
    ("outcome", "result"),
    [
        (Succeeded("s3://farm/b/1.png"), "s3://farm/b/1.png"),
        (Cancelled(Outcome.CANCELLED), "cancelled"),
        (Cancelled(Outcome.LOST), "cancelled"),
    ],
)
def test_flower_shows_where_the_picture_is_or_that_the_job_was_cancelled(outcome: RenderOutcome, result: str) -> None:
    assert task_result(outcome) == result


@pytest.mark.parametrize("outcome", [NothingToClaim(), LostLease()])
def test_flower_hears_nothing_of_a_job_that_another_worker_reports(outcome: RenderOutcome) -> None:
    with pytest.raises(Ignore):
        task_result(outcome)


def test_flower_shows_a_job_that_was_handed_back_as_one_that_goes_on() -> None:
    with pytest.raises(Retry, match="handed back: paused"):
        task_result(HandedBack("paused", Outcome.HANDED_BACK))


def test_the_task_fails_with_the_error_that_failed_the_job() -> None:
    error = BadRequest("no such sampler")
    with pytest.raises(BadRequest) as raised:
        task_result(Failed(error, Outcome.FAILED, ErrorClass.BAD_INPUT))
    assert raised.value is error
