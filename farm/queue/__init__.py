"""Celery on Redis: the app, the messages, and Flower."""
