"""Classifier-free guidance (Ho & Salimans 2022) for many requests at once, each with its own scale."""

from collections.abc import Sequence

import torch

from workers.sampling.tables import column, to_device


def guide(
    outputs: torch.Tensor, rows: Sequence[int], scales: Sequence[float], rescales: Sequence[float]
) -> torch.Tensor:
    """The guided outputs of a forward, (requests, …); each request has two `rows` (negative, positive) or one row.

    A request with one row has no guidance. `rescales`, 0 to 1, are the shares of guidance's added contrast that are
    removed: Lin et al. 2023, section 3.4, as diffusers' `rescale_noise_cfg`.
    """
    if all(count == 1 for count in rows):
        return outputs[: len(rows)]
    negative, positive, place = [], [], 0
    for count in rows:
        negative.append(place)
        place += count
        positive.append(place - 1)
    index = to_device(torch.tensor([negative, positive]), outputs.device)
    without, with_text = outputs[index[0]], outputs[index[1]]
    guided = without + column(scales, outputs) * (with_text - without)
    factors = [rescale if count == 2 else 0.0 for rescale, count in zip(rescales, rows, strict=True)]
    if any(factors):
        deviation = [tensor.flatten(1).std(1).view(-1, *[1] * (outputs.dim() - 1)) for tensor in (with_text, guided)]
        factor = column(factors, outputs)
        rescaled = factor * (guided * (deviation[0] / deviation[1])) + (1 - factor) * guided
        guided = torch.where(factor > 0, rescaled, guided)
    return guided
