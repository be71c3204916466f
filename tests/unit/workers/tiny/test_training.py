"""Training adds the noise that diffusers adds, and a run that was stopped and resumed ends with the same weights."""

import numpy as np
import pytest
import torch
from rich.console import Console

from workers.tiny import autoencoder, build, denoiser
from workers.tiny.fit import Plan
from workers.tiny.train import train

SMALL = build.Widths(vae=(8, 8, 16, 16), unet=(32, 32), text=32, text_layers=1)


def run(folder, stop_at=None):
    train(
        folder,
        widths=SMALL,
        vae_plan=Plan(steps=3, learning_rate=1e-3),
        plan=Plan(steps=6, learning_rate=1e-3, warmup_steps=2),
        refine_plans=[Plan(steps=3, learning_rate=1e-3, warmup_steps=1)],
        decoder_plan=Plan(steps=2, learning_rate=1e-3),
        console=Console(quiet=True),
        vae_pictures=32,
        scene_count=32,
        batch=4,
        stop_at=stop_at,
    )
    return {file.relative_to(folder): file.read_bytes() for file in (folder / "weights").rglob("*.safetensors")}


@pytest.mark.long
def test_a_stopped_run_ends_with_the_same_weights_as_one_that_was_not(tmp_path):
    assert not run(tmp_path / "stopped", stop_at=3)
    taken_up, at_once = run(tmp_path / "stopped"), run(tmp_path / "at_once")
    assert len(at_once) == 3
    assert taken_up == at_once


def test_noise_is_added_as_diffusers_adds_it():
    noise_scheduler = build.build_noise_scheduler()
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    ours = denoiser.add_noise(latents, noise, timesteps, noise_scheduler.alphas_cumprod)
    torch.testing.assert_close(ours, noise_scheduler.add_noise(latents, noise, timesteps))


def test_normalising_the_latents_changes_no_picture(monkeypatch):
    # In float64, where a CPU's rounding hides no error.
    torch.manual_seed(0)
    vae = build.build_vae(SMALL).double()
    to_tensor = autoencoder.to_tensor
    monkeypatch.setattr(autoencoder, "to_tensor", lambda pictures: to_tensor(pictures).double())
    _, pictures = autoencoder.draw_many(64, seed=3)

    def decoded():
        with torch.no_grad():
            return vae.decode(autoencoder.encode(vae, pictures)).sample

    before = decoded()
    autoencoder.normalise(vae, pictures)
    latents = autoencoder.encode(vae, pictures)
    torch.testing.assert_close(decoded(), before)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4).double())
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4).double())


@pytest.mark.parametrize("text", ["", "a red circle", "Ünknown wörds, 日本語 & 7 🙂"])
def test_any_text_can_be_tokenised(text):
    tokenizer = build.build_tokenizer(captions=200)
    ids = denoiser.token_ids(tokenizer, [text])
    assert ids.shape == (1, 77)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip().replace(" ", "") == text.lower().replace(" ", "")


def test_the_learning_rate_rises_and_then_falls_to_nothing():
    plan = Plan(steps=1000, learning_rate=1e-3, warmup_steps=100)
    rates = [plan.rate(step) for step in range(1000)]
    assert np.argmax(rates) == pytest.approx(99, abs=5)
    assert rates[0] == pytest.approx(1e-5)
    assert rates[-1] < 1e-8
