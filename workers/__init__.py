"""The rendering side of the farm: the engine, its pipelines and models, and the Celery worker around them."""
