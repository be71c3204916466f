"""A submission is refused if its model can't use the sampler, according to the workers' registrations."""

from dataclasses import replace

import pytest

from farm.jobs.records import WorkerInfo
from farm.jobs.sampler_check import held_kinds, sampler_problem
from farm.jobs.served_models import ServedModel
from farm.specs.spec import RenderSpec

SD15 = ServedModel("sd15", family="StableDiffusionPipeline", samplers="diffusion")
SD3 = ServedModel("sd3", family="StableDiffusion3Pipeline", samplers="flow")
FLUX = ServedModel("flux", family="FluxPipeline", samplers="flow")
NULL = ServedModel("null", family="NullPipeline", samplers="")
BARE = ServedModel("bare", sha256="e")


def worker(*models: ServedModel, alive: bool = True) -> WorkerInfo:
    return WorkerInfo("w@host", "cpu", "float32", 8, "0", models, alive=alive)


def said(model: str, scheduler: str | None, *workers: WorkerInfo) -> str:
    spec = RenderSpec(prompt="a cat", model=model, scheduler=scheduler)
    return str(sampler_problem(spec, "p.csv:3", held_kinds(workers)) or "")


def test_a_sampler_that_its_model_can_not_use_is_refused_with_those_it_can() -> None:
    refused = said("sd3", "ddim", worker(SD15, SD3))
    assert refused.startswith("p.csv:3: scheduler: ddim can't sample sd3 (flow, StableDiffusion3Pipeline)")
    names = refused.partition("these can: ")[2].split(", ")
    assert {"euler", "heun"} <= set(names)
    assert "ddim" not in names
    assert "dpmpp_2m_karras" not in names


def test_a_sampler_that_only_another_family_of_its_kind_takes_is_refused() -> None:
    assert said("sd3", "heun", worker(SD3, FLUX)) == ""
    assert "heun can't sample flux" in said("flux", "heun", worker(SD3, FLUX))


def test_a_worker_that_has_not_loaded_a_model_leaves_the_others_word() -> None:
    assert "ddim can't sample sd3" in said("sd3", "ddim", worker(SD3), worker(ServedModel("sd3")))


def test_diffusers_class_names_are_checked_as_well() -> None:
    assert "FlowMatchEulerDiscreteScheduler can't" in said("sd15", "FlowMatchEulerDiscreteScheduler", worker(SD15))
    assert said("flux", "FlowMatchEulerDiscreteScheduler", worker(FLUX)) == ""


@pytest.mark.parametrize("model", ["sd15", "sd3", "flux", "null", "bare", "nobody-holds-it"])
def test_the_models_own_sampler_is_always_accepted(model: str) -> None:
    assert said(model, None, worker(SD15, SD3, FLUX, NULL, BARE)) == ""


@pytest.mark.parametrize("scheduler", ["ddim", "FlowMatchEulerDiscreteScheduler"])
def test_what_no_living_worker_tells_is_accepted(scheduler: str) -> None:
    assert said("sd3", scheduler) == ""
    assert said("sd3", scheduler, worker(SD15)) == ""
    assert said("sd3", scheduler, worker(SD3, alive=False)) == ""
    assert said("null", scheduler, worker(NULL)) == ""
    assert said("bare", scheduler, worker(BARE)) == ""
    assert said("sd3", scheduler, worker(SD3), worker(replace(SD3, samplers="diffusion"))) == ""
