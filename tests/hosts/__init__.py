"""The farm on many hosts: each is a network namespace with a name of its own, joined by cables that can be cut."""
