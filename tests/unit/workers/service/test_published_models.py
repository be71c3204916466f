"""The facts about its models that a worker publishes."""

from types import SimpleNamespace
from typing import Any

import torch

from farm.errors import DatabaseUnavailable
from farm.jobs.records import WorkerInfo
from workers.models.pins import Pins
from workers.models.served import Served
from workers.pipelines.null import NullPipeline
from workers.service.published_models import PublishedModels


def test_an_update_that_failed_is_made_later_and_one_without_news_is_not_made() -> None:
    answers, published = iter([DatabaseUnavailable("away"), None, None]), list[WorkerInfo]()

    def describe(info: WorkerInfo) -> None:
        if error := next(answers):
            raise error
        published.append(info)

    workers: Any = SimpleNamespace(describe=describe)
    opener: Any = SimpleNamespace(loaded={})
    info = WorkerInfo("w1@host", "cpu", "float32", 4, "1")
    served = Served(Pins.of({"tiny": NullPipeline()}), opener, torch.device("meta"))
    models = PublishedModels(workers, info, served)
    models.publish()
    assert published == []
    models.publish()
    assert published == [models.info]
