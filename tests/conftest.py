"""What every test may use."""

from hypothesis import settings

pytest_plugins = ["tests.servers"]

# Ten thousand cases of each property: `pytest --hypothesis-profile long`.
settings.register_profile("short", max_examples=200, deadline=None)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile("short")
