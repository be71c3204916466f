"""A farm of the previous release, upgraded to this one while it runs."""
