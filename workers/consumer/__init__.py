"""The Celery and kombu side of a worker: the task, the order of queues, the thread pool, events for Flower."""
