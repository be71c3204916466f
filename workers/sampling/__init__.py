"""Noise schedulers as tables, and guidance."""
