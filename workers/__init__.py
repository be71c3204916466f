"""What renders: the engine, its pipelines and models, and the Celery worker around them."""
