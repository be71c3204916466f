"""The Helm chart: rendered by helm, validated against the API's schemas, and its KEDA queries run on PostgreSQL."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psycopg
import pytest
import sqlalchemy as sa
import yaml

from farm.jobs.database import Database
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from tests.servers import missing

CHART = Path(__file__).parents[2] / "infra" / "helm" / "diffusion-farm"
KUBERNETES = "1.34"
SECRETS = {
    "FARM_DATABASE_URL": "postgresql+psycopg://farm:db-secret@db:5432/farm",
    "FARM_BROKER_URL": "redis://:redis-secret@redis:6379/0",
    "FARM_S3_ACCESS_KEY_ID": "key",
    "FARM_S3_SECRET_ACCESS_KEY": "s3-secret",
    "FLOWER_BASIC_AUTH": "me:flower-secret",
}
VALUES: dict[str, Any] = {
    "secrets": {"values": SECRETS},
    "s3": {"bucket": "pictures", "endpointUrl": "http://s3:8333"},
    "settings": {"FARM_LEASE_SECONDS": "20"},
    "pools": {
        "sd15": {
            "models": {"sd15": "farm:sd15", "org/odd-1.5": "farm:odd"},
            "scaling": {"max": 8},
            "drainSeconds": 100,
        },
        "cpu": {"models": {"tiny": "tiny"}, "gpus": 0, "replicas": 2, "scaling": {"enabled": False}},
    },
}

# Kubernetes' schemas do not include the kinds of KEDA and the Prometheus operator. These schemas cover the fields that
# the chart uses, from keda.sh/docs and prometheus-operator.dev/docs/api-reference, and reject all others.
TEXT = {"type": "string", "minLength": 1}
METADATA = {"required": ["name"], "properties": {"name": TEXT}}


def closed(required: str = "", /, **properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": required.split(),
    }


def kind(spec: dict[str, object]) -> dict[str, object]:
    return closed("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec)


COUNT = {"type": "integer", "minimum": 0}
CUSTOM = {
    ("keda.sh/v1alpha1", "ScaledObject"): kind(
        closed(
            "scaleTargetRef triggers",
            scaleTargetRef=closed("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
            pollingInterval=COUNT,
            cooldownPeriod=COUNT,
            minReplicaCount=COUNT,
            maxReplicaCount=COUNT,
            advanced=closed(
                horizontalPodAutoscalerConfig=closed(
                    behavior=closed(scaleDown=closed(stabilizationWindowSeconds={**COUNT, "maximum": 3600}))
                )
            ),
            triggers={
                "type": "array",
                "minItems": 1,
                "items": closed(
                    "type metadata",
                    type={"enum": ["postgresql", "prometheus"]},
                    metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                    metadata={"type": "object", "additionalProperties": {"type": "string"}},
                    authenticationRef=closed("name", name=TEXT),
                ),
            },
        )
    ),
    ("keda.sh/v1alpha1", "TriggerAuthentication"): kind(
        closed(
            secretTargetRef={
                "type": "array",
                "items": closed("parameter name key", parameter=TEXT, name=TEXT, key=TEXT),
            }
        )
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): kind(
        closed(
            "selector endpoints",
            selector=closed(matchLabels={"type": "object"}),
            endpoints={
                "type": "array",
                "items": closed(
                    port=TEXT,
                    path=TEXT,
                    interval=TEXT,
                    relabelings={
                        "type": "array",
                        "items": closed(
                            "targetLabel",
                            sourceLabels={"type": "array", "items": TEXT},
                            regex=TEXT,
                            targetLabel=TEXT,
                            replacement=TEXT,
                        ),
                    },
                ),
            },
        )
    ),
}


@cache
def helm() -> str:
    found = shutil.which("helm") or shutil.which("helm", path=str(Path(sys.executable).parent))
    if found is None:
        missing("helm is not here: infra/helm/get-helm puts it beside Python")
    return found


@pytest.fixture
def render(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The chart's objects for these values over `VALUES`; raises `CalledProcessError` if helm refuses them."""

    def rendered(values: dict[str, Any] | None = None, *arguments: str) -> list[dict[str, Any]]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump({**VALUES, **(values or {})}))
        said = subprocess.run(
            [helm(), "template", "farm", CHART, "--values", file, "--kube-version", KUBERNETES, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return [each for each in yaml.safe_load_all(said.stdout) if each]

    return rendered


Render = Callable[..., list[dict[str, Any]]]


def check(thing: dict[str, Any]) -> None:
    """Raise for an object that Kubernetes or the operator of its kind would reject."""
    known = CUSTOM.get((thing["apiVersion"], thing["kind"]))
    if known is None:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    else:
        jsonschema.validate(thing, known)


def only(things: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in things if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pods(things: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in things if each["kind"] in ("Deployment", "Job")]


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "secret") for each in pod["containers"][0]["env"]}


EVERYTHING: dict[str, Any] = {
    "metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    "scaling": {"trigger": "prometheus", "prometheus": {"serverAddress": "http://prometheus:9090"}},
    "networkPolicy": {
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
    "flower": {"existingClaim": "flower"},
    "images": {"pullSecrets": [{"name": "registry"}], "worker": {"digest": "sha256:" + "0" * 64}},
    "poolDefaults": {"cache": {"existingClaim": "models"}, "nodeSelector": {"gpu": "l4"}},
    "serviceAccount": {"annotations": {"role": "pictures"}},
    "podAnnotations": {"note": "yes"},
    "podLabels": {"team": "render"},
}


@pytest.mark.parametrize(
    "values", [{}, EVERYTHING, {"pools": {}, "flower": {"enabled": False}}], ids=["usual", "everything", "least"]
)
def test_kubernetes_takes_what_the_chart_makes(render: Render, values: dict[str, Any]) -> None:
    things = render(values)
    for thing in things:
        check(thing)
    assert len({(each["kind"], each["metadata"]["name"]) for each in things}) == len(things)


def test_the_check_would_notice_a_field_that_does_not_exist(render: Render) -> None:
    things = render()
    only(things, "Deployment", "farm-worker-sd15")["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        check(only(things, "Deployment", "farm-worker-sd15"))
    only(things, "ScaledObject", "farm-worker-sd15")["spec"]["cooldown"] = 1
    with pytest.raises(jsonschema.ValidationError, match="cooldown"):
        check(only(things, "ScaledObject", "farm-worker-sd15"))


def test_helm_finds_nothing_wrong_with_the_chart(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    said = subprocess.run([helm(), "lint", "--strict", CHART, "--values", values], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def test_a_worker_has_a_gpu_and_time_to_drain(render: Render) -> None:
    worker = only(render(), "Deployment", "farm-worker-sd15")["spec"]["template"]["spec"]
    (container,) = worker["containers"]
    assert container["args"][0] == "worker"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 1
    env = environment(worker)
    assert env["FARM_MODELS"] == "org/odd-1.5=farm:odd,sd15=farm:sd15"
    assert env["FARM_DEVICE"] == "cuda"
    assert env["FARM_LEASE_SECONDS"] == "20"
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert worker["terminationGracePeriodSeconds"] >= int(env["FARM_DRAIN_SECONDS"]) + pause + 15
    assert any(mount["mountPath"] == "/cache" for mount in container["volumeMounts"])


def test_a_pool_without_gpus_or_scaling_asks_for_none(render: Render) -> None:
    things = render()
    pool = only(things, "Deployment", "farm-worker-cpu")["spec"]
    assert pool["replicas"] == 2
    assert "nvidia.com/gpu" not in str(pool["template"]["spec"]["containers"][0]["resources"])
    assert environment(pool["template"]["spec"])["FARM_DEVICE"] == "cpu"
    assert [each["metadata"]["name"] for each in things if each["kind"] == "ScaledObject"] == ["farm-worker-sd15"]


def test_every_setting_is_one_that_the_farm_knows(render: Render) -> None:
    known = {f"FARM_{name.upper()}" for name in Settings.model_fields}
    for pod in pods(render(EVERYTHING)):
        named = {name for name in environment(pod) if name.startswith("FARM_")}
        assert named <= known


def test_no_pod_has_more_rights_than_it_needs(render: Render) -> None:
    for pod in pods(render()):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_migration_comes_before_the_new_programs(render: Render) -> None:
    things = render()
    job = only(things, "Job", "farm-migrate")
    secret = only(things, "Secret", "farm-migrate")
    hooks = [each["metadata"]["annotations"] for each in (secret, job)]
    assert all(each["helm.sh/hook"] == "pre-install,pre-upgrade" for each in hooks)
    assert int(hooks[0]["helm.sh/hook-weight"]) < int(hooks[1]["helm.sh/hook-weight"])
    # A hook runs before the release exists, so it may refer only to its own Secret or to one of the user's.
    assert job["spec"]["template"]["spec"]["serviceAccountName"] == "default"
    env = job["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {each["valueFrom"]["secretKeyRef"]["name"] for each in env if "valueFrom" in each} == {"farm-migrate"}


def test_secrets_stand_in_secrets_alone_and_have_no_defaults(render: Render) -> None:
    things = render()
    for thing in things:
        if thing["kind"] != "Secret":
            assert "-secret" not in yaml.safe_dump(thing).replace("farm/secret", "")
    own = render({"secrets": {"existingSecret": "mine"}})
    assert not [each for each in own if each["kind"] == "Secret"]
    named = {
        each["valueFrom"]["secretKeyRef"]["name"]
        for pod in pods(own)
        for each in pod["containers"][0]["env"]
        if "valueFrom" in each
    }
    assert named == {"mine"}
    for name in ("FARM_DATABASE_URL", "FARM_BROKER_URL", "FLOWER_BASIC_AUTH"):
        rest = {key: value for key, value in SECRETS.items() if key != name}
        with pytest.raises(subprocess.CalledProcessError) as refused:
            render({"secrets": {"values": rest}})
        assert name in refused.value.stderr


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"s3": {"bucket": ""}}, "bucket"),
        ({"pools": {"a": {}}}, "models"),
        ({"pools": {"a": {"models": {"a": "b"}, "gpu": 1}}}, "gpu"),
        ({"pools": {"A b": {"models": {"a": "b"}}}}, "A b"),
        ({"pools": {"a": {"models": {"a b": "b"}}}}, "a b"),
        ({"settings": {"LEASE": "1"}}, "LEASE"),
        ({"scaling": {"trigger": "prometheus"}}, "serverAddress"),
    ],
)
def test_a_wrong_value_is_refused_by_name(render: Render, values: dict[str, Any], why: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render(values)
    assert why in refused.value.stderr


def test_a_pool_scales_from_zero_by_the_device_seconds_that_wait(render: Render, postgres_url: str) -> None:
    things = render()
    scaled = only(things, "ScaledObject", "farm-worker-sd15")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "farm-worker-sd15"
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (0, 8)
    assert "replicas" not in only(things, "Deployment", "farm-worker-sd15")["spec"]  # KEDA sets them
    # One trigger for each model that the pool pins, in the order of their names.
    odd, sd15 = (trigger["metadata"]["query"] for trigger in scaled["triggers"])
    (reference,) = only(things, "TriggerAuthentication", "farm-postgresql")["spec"]["secretTargetRef"]
    secret = only(things, "Secret", "farm")
    assert reference == {"parameter": "connection", "name": "farm", "key": "KEDA_POSTGRESQL_URL"}
    assert secret["stringData"]["KEDA_POSTGRESQL_URL"] == "postgresql://farm:db-secret@db:5432/farm"

    plain = sa.make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)

    def asked(query: str) -> object:
        with psycopg.connect(plain) as connection:
            (row,) = connection.execute(query.encode()).fetchall()  # as KEDA expects: one row with one number
        (number,) = row
        return float(number)

    assert asked(sd15) == 0  # so KEDA starts no worker
    with closing(Database(postgres_url)) as database:
        store = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))
        store.submissions.submit("some", "me", 50, [RenderSpec(prompt=str(n), model="sd15") for n in range(700)])
        store.submissions.submit("odd", "me", 50, [RenderSpec(prompt="a", model="org/odd-1.5")])
    assert asked(sd15) == 700
    assert asked(odd) == 1
    (trigger,) = {trigger["metadata"]["targetQueryValue"] for trigger in scaled["triggers"]}
    assert asked(sd15) > float(trigger)  # enough for two workers
    assert {trigger["metricType"] for trigger in scaled["triggers"]} == {"AverageValue"}


def test_prometheus_may_be_asked_instead(render: Render) -> None:
    things = render(EVERYTHING)
    odd, sd15 = only(things, "ScaledObject", "farm-worker-sd15")["spec"]["triggers"]
    assert sd15["metadata"]["query"] == (
        'max(farm_queued_device_seconds{model="sd15"}) + max(farm_running_device_seconds{model="sd15"})'
    )
    assert "org/odd-1.5" in odd["metadata"]["query"]
    assert not [each for each in things if each["kind"] == "TriggerAuthentication"]
