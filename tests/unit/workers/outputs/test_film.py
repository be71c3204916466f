"""The trajectory of a picture: the frames that are stored, and the files made of them."""

import io
from dataclasses import dataclass, replace

import pytest
from PIL import Image

from tests.gated import SOON, pixel, request, running
from workers.outputs import film
from workers.pipelines.null import NullPipeline
from workers.render.request import Rendered, RenderRequest


def rendered(one: RenderRequest, pipeline: NullPipeline | None = None) -> Rendered:
    with running(pipeline or NullPipeline()) as engine:
        return engine.submit(one).result(SOON)


def shades(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 * number, 255 - 10 * number, 7)) for number in range(count)]


# --- frames


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_trajectory_has_a_frame_a_step_and_the_picture_as_its_last(steps: int) -> None:
    made = rendered(request("a", steps, trajectory=True))
    assert len(made.frames) == steps
    assert made.frames[-1] is made.image
    for step, frame in enumerate(made.frames, start=1):
        assert frame.size == (64, 64)
        assert frame.getpixel((0, 0)) == pytest.approx([value * step / steps for value in pixel(1)], abs=1)


def test_who_did_not_ask_for_one_gets_none() -> None:
    assert rendered(request("a", 5)).frames == ()


@dataclass(frozen=True)
class SecondOrder(NullPipeline):
    """A null pipeline that takes two forwards for each step but the last, as Heun's method does."""

    def plan(self, request: RenderRequest) -> tuple[int, ...]:
        shape = super().plan(request)
        forwards = 2 * request.spec.num_inference_steps - 1
        request.sampling = replace(
            request.sampling,
            timesteps=tuple(float(index) for index in range(forwards)),
            scales=(1.0,) * (forwards + 1),
            weights=((1.0, 1.0 / forwards),) * forwards,
            draws=(0,) * forwards,
        )
        return shape


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_sampler_of_two_forwards_a_step_has_a_frame_a_step_too(steps: int) -> None:
    made = rendered(request("a", steps, trajectory=True), SecondOrder())
    assert len(made.frames) == steps
    assert made.image.getpixel((0, 0)) == pixel(1)
    shown = [frame.getpixel((0, 0)) for frame in made.frames]
    assert shown == sorted(shown)


# --- files


def test_an_animation_plays_every_frame_as_it_was() -> None:
    frames = shades(7)
    opened = Image.open(io.BytesIO(film.animation(frames)))
    assert (opened.format, opened.n_frames, opened.size) == ("WEBP", 7, (64, 48))
    for number, frame in enumerate(frames):
        opened.seek(number)
        assert opened.convert("RGB").tobytes() == frame.tobytes()


def test_a_film_of_one_frame_is_one_too() -> None:
    assert Image.open(io.BytesIO(film.animation(shades(1)))).size == (64, 48)
    assert Image.open(io.BytesIO(film.strip(shades(1)))).size == (64, 48)


def test_steps_that_look_the_same_stay_steps() -> None:
    opened = Image.open(io.BytesIO(film.strip([Image.new("RGB", (8, 8), "red")] * 3)))
    assert opened.size == (24, 8)


def test_a_strip_has_every_step_row_by_row() -> None:
    frames = shades(23)
    page = Image.open(io.BytesIO(film.strip(frames)))
    assert (page.format, page.size) == ("PNG", (10 * 64, 3 * 48))
    for number, frame in enumerate(frames):
        corner = number % 10 * 64, number // 10 * 48
        assert page.getpixel(corner) == frame.getpixel((0, 0))
        assert page.getpixel((corner[0] + 63, corner[1] + 47)) == frame.getpixel((0, 0))


def test_large_steps_are_made_small_in_a_strip_and_keep_their_shape() -> None:
    page = Image.open(io.BytesIO(film.strip(shades(3, (1024, 512)))))
    assert page.size == (3 * 256, 128)
