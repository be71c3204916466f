"""Everything that knows Celery and kombu: the task, the order of queues, the thread pool, events for Flower."""
