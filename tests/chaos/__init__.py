"""Chaos tests: real processes and servers are killed, frozen, disconnected and slowed down under load."""
