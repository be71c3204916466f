"""A render: the request and its state, the pipeline that draws it, the device, and how it can fail."""
