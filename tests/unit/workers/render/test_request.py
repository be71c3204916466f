"""A render request: its finished steps, its pace, and its snapshot."""

from types import SimpleNamespace

import pytest
import torch

from farm.specs.spec import RenderSpec
from workers.render.request import Progress, RenderRequest, Sampling


def request(steps: int = 4, forwards: int | None = None, **options: object) -> RenderRequest:
    """Return a planned and encoded request; a second-order sampler has more forwards than steps."""
    made = RenderRequest("a", RenderSpec(prompt="x", seed=1, num_inference_steps=steps), **options)
    count = steps if forwards is None else forwards
    timesteps = tuple(float(n) for n in range(count, 0, -1))
    made.sampling = Sampling("none", timesteps, init_noise_sigma=1.0, make=lambda: None)
    made.latents = torch.zeros(1, 3, 8, 8)
    made.generator = torch.Generator("cpu").manual_seed(1)
    return made


def test_steps_are_counted_in_those_of_the_spec_whatever_the_number_of_forwards() -> None:
    made = request(steps=4, forwards=7)
    counted = []
    for forwards in range(8):
        made.step_index = forwards
        counted.append(made.steps_done)
    assert counted == [0, 0, 1, 1, 2, 2, 3, 4]
    assert made.denoised


def test_no_step_is_done_before_the_sampler_is_chosen() -> None:
    made = RenderRequest("a", RenderSpec(prompt="x"))
    assert made.steps_done == 0
    assert made.progress(now=5.0) == Progress(0, made.spec.num_inference_steps, None, None)


def test_a_request_that_waits_has_no_time_and_no_pace() -> None:
    made = request()
    assert made.progress(now=5.0) == Progress(0, 4, None, None)
    assert made.seconds_left is None


def test_the_pace_is_smoothed_over_the_last_forwards() -> None:
    made = request(steps=4)
    made.started = made.stepped = 10.0
    made.stepped_at(11.0)
    assert made.progress(now=11.5) == Progress(1, 4, 1.5, 1.0)
    assert made.seconds_left == pytest.approx(3.0)
    made.stepped_at(13.0)
    assert made.seconds_per_forward == pytest.approx(0.7 * 1.0 + 0.3 * 2.0)
    assert made.seconds_left == pytest.approx(2 * 1.3)


def test_the_pace_is_by_step_of_the_spec_and_the_rest_by_forward() -> None:
    made = request(steps=4, forwards=8)
    made.seconds_per_forward, made.step_index = 0.5, 2
    assert made.seconds_per_step == pytest.approx(1.0)
    assert made.seconds_left == pytest.approx(3.0)


def test_a_forward_that_nobody_began_to_time_counts_without_a_pace() -> None:
    made = request()
    made.stepped_at(3.0)
    assert (made.step_index, made.stepped, made.seconds_per_forward) == (1, 3.0, None)


def test_the_first_step_with_bad_latents_is_remembered() -> None:
    made, found = request(steps=4), []
    for finite in (True, False, True, False):
        made.step_index += 1
        made.note_finite(torch.tensor(finite))
        assert made.first_bad is not None
        found.append(int(made.first_bad))
    assert found == [0, 2, 2, 2]


def test_a_snapshot_keeps_its_state_while_the_request_goes_on() -> None:
    made = request(steps=4, forwards=8)
    made.history = (torch.ones(1, 3, 8, 8),)
    made.step_index = 4
    latents, history = made.latents, made.history
    expected = torch.rand(3, generator=torch.Generator("cpu").manual_seed(1))
    kept = made.snapshot("e" * 64)

    made.latents, made.history = made.latents + 1, ()  # a step replaces them in the same way
    torch.rand(3, generator=made.generator)
    made.step_index += 1
    assert (kept.spec, kept.model_sha256, kept.step_index, kept.steps_done) == (made.spec, "e" * 64, 4, 2)
    assert kept.latents is latents
    assert kept.history is history
    assert kept.scheduler == {}
    again = torch.Generator("cpu")
    again.set_state(kept.generator)
    assert torch.equal(torch.rand(3, generator=again), expected)


def test_a_snapshot_copies_the_lists_of_a_scheduler_that_changes_them_in_place() -> None:
    made = request()
    made.scheduler = SimpleNamespace(model_outputs=[1, 2], step_index=3)
    kept = made.snapshot("e" * 64)
    made.scheduler.model_outputs.append(4)
    made.scheduler.step_index += 1
    assert kept.scheduler == {"model_outputs": [1, 2], "step_index": 3}
