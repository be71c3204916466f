"""The files of a render: PNG, film strip, animation, checkpoint."""
