"""S3: the object store, objects of many gigabytes, and the models in it."""
