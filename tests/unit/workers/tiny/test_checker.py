"""The checker accepts true pictures and rejects all others."""

import random

import numpy as np
import pytest
from PIL import Image

from workers.tiny import scenes
from workers.tiny.checker import check, look


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(11)
    some = [scenes.random_scene(rng) for _ in range(300)]
    return [(scene, scenes.draw(scene, rng), scenes.caption(scene, rng)) for scene in some]


def test_true_scenes_are_seen_as_they_were_drawn(drawn):
    assert np.mean([look(picture) == scene for scene, picture, _ in drawn]) >= 0.98
    assert np.mean([check(picture, words).right for _, picture, words in drawn]) >= 0.98


def test_shuffled_captions_are_refused(drawn):
    captions = [words for _, _, words in drawn]
    random.Random(0).shuffle(captions)
    assert np.mean([check(picture, words).right for (_, picture, _), words in zip(drawn, captions, strict=True)]) < 0.2


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("a red heart left of a white ring on a blue background", set()),
        ("a heart and a ring", set()),
        ("a red star left of a white ring on a blue background", {"shape"}),
        ("a red heart left of a yellow ring on a blue background", {"colour"}),
        ("a red heart left of a white ring on a black background", {"background"}),
        ("a small red heart left of a white ring", {"size"}),
        ("a red heart right of a white ring", {"order", "shape", "colour"}),
        ("a red heart", {"count", "shape", "colour", "size", "order"}),
    ],
)
def test_each_attribute_is_judged_by_itself(words, wrong):
    scene = scenes.parse("a big red heart left of a small white ring on a blue background")
    verdict = check(scenes.draw(scene, random.Random(3)), words)
    assert {name for name in verdict.__slots__ if not getattr(verdict, name)} == wrong
    assert verdict.right == (not wrong)


@pytest.mark.parametrize("side", [64, 128, 512])
def test_larger_pictures_are_judged_as_well(side):
    picture = Image.fromarray(scenes.draw(scenes.parse("a big green star on a pink background"), random.Random(0)))
    assert check(picture.resize((side, side)), "a big green star on pink").right


def test_noise_and_emptiness_are_nothing():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not check(noise, "a red circle").right
    assert not check(np.zeros((64, 64, 3), np.uint8), "a red circle").right
