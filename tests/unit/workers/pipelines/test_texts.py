"""Text embeddings are kept in a bounded cache, and computed only for new texts."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers.models.attention_processor import Attention

from farm.specs.spec import RenderSpec
from workers.pipelines.texts import Embeddings, Text, remember_texts


def asked(kept: Embeddings, text: str, size: int = 1, **spec: object) -> bool:
    """Ask for a text's embedding; returns whether it had to be computed."""
    made = []

    def make(text: Text) -> tuple[dict[str, torch.Tensor], list[str]]:
        made.append(text)
        return {"encoder_hidden_states": torch.zeros(size)}, []

    kept.get(Text.of(RenderSpec.parse({"prompt": text, **spec})), make)
    return bool(made)


def test_a_text_is_embedded_once_in_each_way() -> None:
    kept = Embeddings(8)
    assert [asked(kept, "a", clip_skip=skip) for skip in (None, None, 2, 2)] == [True, False] * 2
    assert (kept.hits, kept.misses) == (2, 2)


def test_a_text_is_embedded_again_only_for_what_changes_its_embedding() -> None:
    spec = RenderSpec(prompt="a", negative_prompt="a", seed=1)
    others = {"seed": 2, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "b"}
    assert all(Text.of(spec.model_copy(update={name: value})) == Text.of(spec) for name, value in others.items())
    assert len({Text.of(spec), Text.of(spec, negative=True), Text.of(spec.model_copy(update={"clip_skip": 1}))}) == 3


def test_the_least_recently_used_text_leaves_and_the_empty_one_never() -> None:
    kept = Embeddings(3)
    for text in ("", "a", "b", "a", "c"):
        asked(kept, text)
    assert [asked(kept, text) for text in ("", "a", "c", "b")] == [False, False, False, True]


def test_large_embeddings_leave_before_there_are_many() -> None:
    kept = Embeddings(1000, most_bytes=4 * 100)
    for number in range(20):
        asked(kept, str(number), size=30)
    assert [asked(kept, str(number), size=30) for number in (17, 18, 19)] == [False] * 3
    assert asked(kept, "16", size=30)


def test_one_text_is_made_at_a_time_and_for_all_who_wait_for_it() -> None:
    kept, asking, making, alone = Embeddings(8), threading.Barrier(6), threading.Lock(), []

    def make(text: Text) -> tuple[dict[str, torch.Tensor], list[str]]:
        alone.append(making.acquire(blocking=False))
        time.sleep(0.05)  # time for a concurrent call to begin
        making.release()
        return {"encoder_hidden_states": torch.zeros(1)}, []

    def ask(text: str) -> None:
        asking.wait()
        kept.get(Text.of(RenderSpec(prompt=text)), make)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, "aaabbb"))
    assert (alone, kept.hits, kept.misses) == ([True, True], 4, 2)


def test_no_memory_keeps_nothing() -> None:
    kept = Embeddings(0)
    assert [asked(kept, text) for text in ("", "", "a", "a")] == [True] * 4


def test_cross_attention_makes_its_keys_once_for_one_tensor_of_texts() -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    plain = [attention(torch.ones(2, 3, 8), texts) for texts in (torch.ones(2, 5, 6), torch.zeros(2, 5, 6))]
    remember_texts(attention)
    calls = []
    attention.to_k.layer.register_forward_hook(lambda *_: calls.append(1))
    ones, zeros = torch.ones(2, 5, 6), torch.zeros(2, 5, 6)
    assert torch.equal(attention(torch.ones(2, 3, 8), ones), plain[0])
    assert torch.equal(attention(torch.ones(2, 3, 8), ones), plain[0])
    assert len(calls) == 1
    assert torch.equal(attention(torch.ones(2, 3, 8), zeros), plain[1])
    assert torch.equal(attention(torch.ones(2, 3, 8), ones), plain[0])
    assert len(calls) == 3
