"""What to render: the spec, its samplers, the keys of its objects, and the files and grids that specs are read from."""
