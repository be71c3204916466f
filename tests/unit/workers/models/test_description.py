"""What a worker says of itself while it runs."""

from farm.jobs.records import WorkerInfo
from workers.models.description import standing

GIB = 2**30


def told(models: tuple[dict[str, object], ...]) -> WorkerInfo:
    return WorkerInfo("w1@host", "cuda:0", "bfloat16", 16, "1", models)


def test_it_says_which_models_are_loaded_and_what_memory_is_taken() -> None:
    models = standing([{"name": "a", "sha256": "e" * 64}, {"name": "b"}], {}, ["b"], (20 * GIB, 80 * GIB))
    info = told(models)  # type: ignore[arg-type]
    assert (info.held, info.memory) == (("b",), (20 * GIB, 80 * GIB))


def test_a_little_more_memory_is_no_news() -> None:
    first = standing([{"name": "a"}], {}, ["a"], (20 * GIB, 80 * GIB))
    assert standing(first, {}, ["a"], (20 * GIB + GIB // 8, 80 * GIB)) == first
    assert standing(first, {}, ["a"], (21 * GIB, 80 * GIB)) != first


def test_what_a_worker_said_at_its_start_is_enough_and_nobody_need_know_its_memory() -> None:
    info = told(({"name": "a", "sha256": "e" * 64}, {"name": "b"}))
    assert (info.held, info.memory) == (("a",), None)
    assert told(standing(info.models, {}, ["a"], None)).memory is None  # type: ignore[arg-type]


def test_what_is_known_of_a_model_that_is_loaded_later_joins_what_was_said_before() -> None:
    first = standing([{"name": "a", "most_row_pixels": 4096}], {}, [], None)
    (later,) = standing(first, {"a": {"sha256": "e" * 64}}, ["a"], None)
    assert later == {"name": "a", "most_row_pixels": 4096, "sha256": "e" * 64, "held": True}
    assert standing([later], {"a": {"sha256": "e" * 64}}, ["a"], None) == (later,)
