"""The state of a running request, packed into bytes and unpacked."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from farm.specs.spec import RenderSpec
from workers.outputs import checkpoint
from workers.render.request import Snapshot


def snapshot(**changes: Any) -> Snapshot:
    generator = torch.Generator().manual_seed(7)
    made = Snapshot(
        spec=RenderSpec(prompt="a cät\n", num_inference_steps=9, guidance_scale=7.3, seed=2**32 - 1, scheduler="heun"),
        model_sha256="ab" * 32,
        step_index=5,
        steps_done=3,
        latents=torch.randn(1, 4, 8, 8, generator=generator),
        history=(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)),
        generator=generator.get_state(),
        scheduler={},
    )
    return replace(made, **changes)


def rewritten(data: bytes, **header: Any) -> bytes:
    """Return the same file with changed entries in its header."""
    length = int.from_bytes(data[:8], "little")
    was = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
    return save(load(data), {"state": json.dumps({**was, **header})})


def test_what_was_packed_comes_back_bit_for_bit() -> None:
    kept = snapshot()
    back = checkpoint.unpack(checkpoint.pack(kept))
    for name in ("spec", "model_sha256", "step_index", "steps_done", "scheduler"):
        assert getattr(back, name) == getattr(kept, name)
    assert torch.equal(back.latents, kept.latents)
    assert torch.equal(back.generator, kept.generator)
    assert len(back.history) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(back.history, kept.history, strict=True))


def test_the_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(7)
    torch.randn(13, generator=generator)
    kept = checkpoint.pack(snapshot(generator=generator.get_state()))
    again = torch.Generator()
    again.set_state(checkpoint.unpack(kept).generator)
    assert torch.equal(torch.randn(9, generator=again), torch.randn(9, generator=generator))


def test_what_a_noise_scheduler_remembers_comes_back() -> None:
    memory = {
        "_step_index": 4,
        "_begin_index": None,
        "model_outputs": [torch.ones(1, 4, 8, 8), None],
        "sigmas": torch.arange(5.0),
        "timesteps": np.arange(5, dtype=np.int64),
        "lower_order_nums": 2,
        "is_scale_input_called": True,
        "last_sample": None,
    }
    back = checkpoint.unpack(checkpoint.pack(snapshot(scheduler=memory))).scheduler
    assert set(back) == set(memory)
    assert (back["_step_index"], back["_begin_index"], back["lower_order_nums"]) == (4, None, 2)
    assert back["is_scale_input_called"] is True
    assert torch.equal(back["model_outputs"][0], memory["model_outputs"][0])
    assert back["model_outputs"][1] is None
    assert torch.equal(back["sigmas"], memory["sigmas"])
    assert back["timesteps"].dtype == np.int64
    assert back["timesteps"].tolist() == [0, 1, 2, 3, 4]


def test_a_view_of_a_large_forward_is_packed_alone() -> None:
    forward = torch.randn(64, 4, 64, 64)
    whole = len(checkpoint.pack(snapshot(latents=forward)))
    assert len(checkpoint.pack(snapshot(latents=forward[3:4]))) < whole / 20


@pytest.mark.parametrize("part", [0, 4, 8, 100, 0.3, 0.99])
def test_a_truncated_file_is_refused(part: float) -> None:
    data = checkpoint.pack(snapshot())
    with pytest.raises(ValueError, match="not a render's state"):
        checkpoint.unpack(data[: int(part * len(data)) if part < 1 else int(part)])


@pytest.mark.parametrize(
    "data",
    [b"", b"PNG", b"\xff" * 4096, b"\x00" * 64, save({"latents": torch.zeros(1)}), save({}, {"state": "[]"})],
    ids=["empty", "text", "ones", "zeros", "other tensors", "no state"],
)
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        checkpoint.unpack(data)


def test_another_version_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=f"a state of version 99, this is {checkpoint.VERSION}"):
        checkpoint.unpack(rewritten(checkpoint.pack(snapshot()), version=99))


@pytest.mark.parametrize(
    "header",
    [{"history": 3}, {"history": None}, {"step_index": "x"}, {"spec": {}}, {"spec": None}, {"scheduler": None}],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(header: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        checkpoint.unpack(rewritten(checkpoint.pack(snapshot()), **header))


def test_a_spec_is_packed_in_the_form_that_workers_of_the_previous_release_read() -> None:
    state = snapshot()
    data = checkpoint.pack(state)
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["state"])
    assert header["spec"] == json.loads(state.spec.to_json())
    assert "max_sequence_length" not in header["spec"]
