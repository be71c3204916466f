"""Trains the tiny model from scratch and writes its checkpoint folder.

    python -m workers.tiny.train --out build/tiny

Stages: the autoencoder; on its latents, the UNet and the text encoder; both again from the average of their weights at
half the rate; the decoder alone, with fixed latents. Then `OUT/weights` is written. The command resumes after a stop;
the same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from workers.tiny import autoencoder, build, denoiser
from workers.tiny.fit import Plan, fit

SCENES = 40_000
VAE_PICTURES = 20_000
TEST_SCENES = 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all stages, then write the checkpoint."""
    options = _parser().parse_args(arguments)
    console = Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    train(
        options.out,
        widths=build.Widths(),
        vae_plan=Plan(options.vae_steps, 1.5e-3, seed=options.seed, average=0.998),
        plan=Plan(options.steps, 8e-4, seed=options.seed, warmup_steps=300),
        refine_plans=[Plan(steps, 4e-4, options.seed + n) for n, steps in enumerate(options.refine_steps, 1)],
        decoder_plan=Plan(options.decoder_steps, 8e-4, seed=options.seed, average=0.998),
        console=console,
    )


def train(
    out: Path,
    *,
    widths: build.Widths,
    vae_plan: Plan,
    plan: Plan,
    refine_plans: Sequence[Plan],
    decoder_plan: Plan,
    console: Console,
    vae_pictures: int = VAE_PICTURES,
    scene_count: int = SCENES,
    batch: int = 64,
    stop_at: int | None = None,
) -> None:
    """Train all stages, resuming from `out`, and write `out/weights`.

    `stop_at` stops at that step of the denoiser, as a kill would.
    """
    seed = plan.seed
    torch.manual_seed(seed)
    vae = build.build_vae(widths)
    tokenizer = build.build_tokenizer()
    trained = denoiser.Denoiser(build.build_text_encoder(widths, tokenizer), build.build_unet(widths))
    noise_scheduler = build.build_noise_scheduler()

    _, pictures = autoencoder.draw_many(vae_pictures, seed)
    vae = fit("vae", vae, autoencoder.autoencoder_loss(vae, pictures, batch=16), vae_plan, out, console=console)
    autoencoder.normalise(vae, pictures[:2048])
    latent_spread = autoencoder.encode(vae, pictures[:2048]).std().item()
    vae.register_to_config(scaling_factor=round(1 / latent_spread, 5))
    test_scenes, test_pictures = autoencoder.draw_many(min(TEST_SCENES, scene_count), seed + 1)
    console.print(f"picture mse {autoencoder.reconstruction_error(vae, test_pictures):.5f}")

    drawn, pictures = autoencoder.draw_many(scene_count, seed + 2)
    cached = out / "latents.pt"
    if not cached.exists():
        torch.save(autoencoder.encode(vae, pictures) * vae.config.scaling_factor, cached)
    latents = torch.load(cached, weights_only=True)
    for number, its_plan in enumerate((plan, *refine_plans)):
        name = f"refined-{number}" if number else "denoiser"
        trained.requires_grad_(True)
        loss = denoiser.denoiser_loss(trained, tokenizer, noise_scheduler, drawn, latents, batch)
        trained = fit(name, trained, loss, its_plan, out, stop_at=stop_at, console=console)
        if stop_at is not None:
            return
    polished = autoencoder.Decoder(vae).requires_grad_(True)
    unscaled = latents / vae.config.scaling_factor
    polish_loss = autoencoder.decoder_loss(polished, pictures, unscaled, batch=16)
    polished = fit("decoder", polished, polish_loss, decoder_plan, out, console=console)
    vae.post_quant_conv, vae.decoder = polished.post_quant_conv, polished.decoder
    console.print(f"picture mse {autoencoder.reconstruction_error(vae, test_pictures):.5f}")
    test_latents = autoencoder.encode(vae, test_pictures) * vae.config.scaling_factor
    error = denoiser.noise_error(trained, tokenizer, noise_scheduler, test_scenes, test_latents)
    console.print(f"noise mse {error:.5f}")
    megabytes = build.save(out / "weights", tokenizer, trained.text_encoder, trained.unet, vae, noise_scheduler)
    console.print(f"{megabytes:.1f} MB in {out / 'weights'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers.tiny.train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/tiny"),
        help="Folder for the training state and the weights (default: %(default)s).",
    )
    parser.add_argument(
        "--vae-steps", type=int, default=5500, help="Training steps of the autoencoder (default: %(default)s)."
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=7000,
        help="Training steps of the UNet and the text encoder (default: %(default)s).",
    )
    parser.add_argument(
        "--refine-steps",
        type=int,
        nargs="*",
        default=[1000, 4000],
        help="Training steps of each round that starts from the average of their weights (default: 1000 4000).",
    )
    parser.add_argument(
        "--decoder-steps",
        type=int,
        default=2000,
        help="Training steps of the decoder alone, last (default: %(default)s).",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the scenes and of the weights (default: %(default)s)."
    )
    parser.add_argument(
        "--threads", type=int, help="Number of threads of torch; another number may give another result."
    )
    return parser


if __name__ == "__main__":
    main()
