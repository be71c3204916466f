import json
from pathlib import Path

import pytest

import farm
from farm.errors import NotConfigured
from farm.settings import (
    EMBEDDED_FILE,
    Settings,
    child_environment,
    embedded_home,
    uses_embedded_farm,
    variables_naming_a_farm,
)
from farm.settings.__main__ import page

SERVICES = {"database_url": "sqlite:///x.db", "broker_url": "redis://:pw@h/0", "s3_bucket": "b"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".farm"
    folder.mkdir()
    return folder


def leave(home: Path, **more: object) -> None:
    (home / EMBEDDED_FILE).write_text(json.dumps({**SERVICES, "ports": {"redis": 1}, **more}))


def set_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SERVICES:
        monkeypatch.setenv(f"FARM_{name.upper()}", f"env-{name}")


def test_an_embedded_farm_in_this_folder_is_found(home: Path) -> None:
    leave(home)
    assert Settings.load().database_url == "sqlite:///x.db"


def test_an_embedded_farm_in_another_home_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    monkeypatch.chdir("/")
    monkeypatch.setenv("FARM_HOME", str(home))
    assert Settings.load().s3_bucket == "b"


def test_services_in_the_environment_are_used_instead(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home, s3_access_key_id="embedded")
    set_all(monkeypatch)
    settings = Settings.load()
    assert settings.broker_url == "env-broker_url"
    assert settings.s3_access_key_id is None  # boto3 reads AWS_* itself


def test_other_settings_do_not_hide_an_embedded_farm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    monkeypatch.setenv("FARM_SLOTS", "3")
    settings = Settings.load()
    assert (settings.slots, settings.s3_bucket) == (3, "b")


def test_half_a_farm_in_the_environment_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    monkeypatch.setenv("FARM_DATABASE_URL", "sqlite:///y.db")
    with pytest.raises(NotConfigured, match="FARM_BROKER_URL, FARM_S3_BUCKET not set"):
        Settings.load()


@pytest.mark.parametrize("name", ["FARM_DATABASE_URL", "farm_database_url", "Farm_S3_Endpoint_Url", "farm_env_file"])
def test_a_variable_that_names_a_farm_counts_in_any_case(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    leave(home)
    monkeypatch.setenv(name, "elsewhere")
    assert variables_naming_a_farm() == [name]
    assert not uses_embedded_farm()
    with pytest.raises(NotConfigured, match=r"not set, while|can't be read"):
        Settings.load()


def test_the_url_of_flower_names_no_farm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    monkeypatch.setenv("FARM_FLOWER_URL", "http://flower:5555")
    assert uses_embedded_farm()
    settings = Settings.load()
    assert (settings.s3_bucket, settings.flower_url) == ("b", "http://flower:5555")


def test_the_object_store_of_another_farm_is_refused_and_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    monkeypatch.setenv("FARM_S3_ENDPOINT_URL", "https://s3.lan")
    with pytest.raises(NotConfigured, match="FARM_S3_BUCKET not set, while FARM_S3_ENDPOINT_URL is: set all of them"):
        Settings.load()


def test_the_home_is_found_in_any_case(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded_home() == Path(".farm")
    monkeypatch.setenv("farm_home", "/elsewhere")
    assert embedded_home() == Path("/elsewhere")


def test_a_child_of_the_embedded_farm_uses_that_farm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    set_all(monkeypatch)
    for name, value in {
        "farm_s3_endpoint_url": "https://s3.lan",
        "FARM_ENV_FILE": "farm.env",
        "farm_home": "/elsewhere",
        "farm_slots": "3",
        "Other": "kept",
    }.items():
        monkeypatch.setenv(name, value)
    environment = child_environment(home)
    assert {name: value for name, value in environment.items() if name.lower().startswith("farm_")} == {
        "FARM_HOME": str(home),
        "FARM_SLOTS": "3",
    }
    assert environment["Other"] == "kept"


def test_without_any_farm_one_is_told_what_to_do(home: Path) -> None:
    with pytest.raises(NotConfigured, match="farm up"):
        Settings.load()


def test_a_wrong_value_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    monkeypatch.setenv("FARM_SLOTS", "many")
    with pytest.raises(NotConfigured, match="FARM_SLOTS"):
        Settings.load()


def test_secrets_are_not_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home, broker_url="redis://:hunter2@h/0", s3_access_key_id="me", s3_secret_access_key="hunter3")
    assert "hunter" not in repr(Settings.load())


def test_sizes_have_units_and_none_switches_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    assert (Settings.load().memory_budget, Settings.load().checkpoint_seconds) == (None, 30.0)
    monkeypatch.setenv("FARM_MEMORY_BUDGET", "20GiB")
    monkeypatch.setenv("FARM_CHECKPOINT_SECONDS", "none")
    monkeypatch.setenv("FARM_CHECKPOINT_STEPS", "10")
    settings = Settings.load()
    assert (settings.memory_budget, settings.checkpoint_seconds, settings.checkpoint_steps) == (20 * 2**30, None, 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MEMORY_BUDGET", "20 bananas"),
        ("MEMORY_BUDGET", "0"),
        ("CHECKPOINT_SECONDS", "0"),
        ("CHECKPOINT_STEPS", "0"),
        ("PREVIEW_STEPS", "0"),
        ("LEASE_SECONDS", "inf"),
        ("DRAIN_SECONDS", "nan"),
        ("EMBEDDINGS", "-1"),
        ("COMPILE", "perhaps"),
    ],
)
def test_a_setting_out_of_bounds_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    leave(home)
    monkeypatch.setenv(f"FARM_{name}", value)
    with pytest.raises(NotConfigured, match=f"FARM_{name}: .*{value}"):
        Settings.load()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"LEASE_SECONDS": "1"}, "FARM_LEASE_SECONDS=1 is too short for FARM_BEAT_SECONDS=2: make it more than 4.5 s"),
        ({"BEAT_SECONDS": "5"}, "FARM_LEASE_SECONDS=10 is too short for FARM_BEAT_SECONDS=5"),
        ({"LEASE_SECONDS": "4.5"}, "FARM_LEASE_SECONDS=4.5 is too short"),
        ({"RETRY_SECONDS": "301"}, "FARM_RETRY_SECONDS=301 is more than FARM_RETRY_MAX_SECONDS=300"),
        (
            {"DATABASE_URL": "sqlite://", "BROKER_URL": "redis://h", "S3_BUCKET": "b", "S3_ACCESS_KEY_ID": "me"},
            "FARM_S3_ACCESS_KEY_ID and FARM_S3_SECRET_ACCESS_KEY: set both",
        ),
    ],
)
def test_settings_that_are_impossible_together_are_refused_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], why: str
) -> None:
    leave(home)
    for name, value in values.items():
        monkeypatch.setenv(f"FARM_{name}", value)
    with pytest.raises(NotConfigured) as raised:
        Settings.load()
    assert str(raised.value).startswith(why)
    assert "\n" not in str(raised.value)


def test_the_shortest_lease_that_two_beats_fit_into_is_accepted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(home)
    monkeypatch.setenv("FARM_LEASE_SECONDS", "4.6")
    assert Settings.load().lease_seconds == 4.6


def test_every_setting_says_what_it_means() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_page_of_all_settings_is_current() -> None:
    written = Path(farm.__file__).parents[1] / "docs" / "settings.md"
    assert written.read_text() == page(), "python -m farm.settings > docs/settings.md"


def test_the_page_does_not_depend_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = page()
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("FARM_SLOTS", "3")
    assert page() == here
