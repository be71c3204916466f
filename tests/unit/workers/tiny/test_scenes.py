"""Scenes are drawn and described reproducibly, and held-out figures are never trained on."""

import random
import subprocess
import sys

import numpy as np
import pytest

from workers.tiny import scenes


def test_a_caption_says_nothing_that_is_not_in_its_scene():
    rng = random.Random(1)
    for _ in range(2000):
        scene = scenes.random_scene(rng)
        words = scenes.caption(scene, rng)
        assert scene.agrees_with(scenes.parse(words)), (words, scene)


@pytest.mark.parametrize(
    ("words", "figures", "background"),
    [
        ("a red circle on a white background", [("circle", "red", None)], "white"),
        ("a tiny violet star, gray background", [("star", "purple", "small")], "grey"),
        ("pink box on black", [("square", "pink", None)], "black"),
        ("a heart", [("heart", None, None)], None),
        ("a green heart and a large white ring", [("heart", "green", None), ("ring", "white", "big")], None),
        ("A white ring to the right of a green heart", [("heart", "green", None), ("ring", "white", None)], None),
        (
            "a ring on the right, a red heart on the left on blue",
            [("heart", "red", None), ("ring", None, None)],
            "blue",
        ),
        ("a ring on the left and a red heart on the right", [("ring", None, None), ("heart", "red", None)], None),
    ],
)
def test_a_caption_is_read_back_as_meant(words, figures, background):
    assert scenes.parse(words) == scenes.Scene(tuple(scenes.Figure(*figure) for figure in figures), background)


@pytest.mark.parametrize("words", ["", "a photo of an astronaut", "a star, a ring and a cross"])
def test_words_that_name_no_scene_are_refused(words):
    with pytest.raises(ValueError, match="found"):
        scenes.parse(words)


def test_the_same_seed_draws_the_same_picture():
    def picture():
        rng = random.Random(7)
        return scenes.draw(scenes.random_scene(rng), rng)

    assert np.array_equal(picture(), picture())
    assert picture().shape == (64, 64, 3)


def test_held_out_figures_are_never_trained_on():
    rng = random.Random(2)
    for _ in range(5000):
        scene = scenes.random_scene(rng)
        assert not any(scenes.held_out(f.shape, f.colour, scene.background) for f in scene.figures)


def test_every_figure_asked_for_when_judging_was_held_out():
    captions = scenes.held_out_captions(300)
    assert len({scenes.parse(words) for words in captions}) > 200
    for words in captions:
        scene = scenes.parse(words)
        assert all(scenes.held_out(f.shape, f.colour, scene.background) for f in scene.figures), words


def test_each_shape_colour_and_background_is_seen_in_training_and_held_out_somewhere():
    triples = [(s, c, b) for s in scenes.SHAPES for c in scenes.COLOURS for b in scenes.BACKGROUNDS if c != b]
    for kept_out in (True, False):
        some = [triple for triple in triples if scenes.held_out(*triple) == kept_out]
        assert [len({triple[i] for triple in some}) for i in range(3)] == [8, 9, 6]


def test_scenes_and_the_checker_need_no_torch():
    code = "import sys, workers.tiny.checker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
