"""On what: GPUs, the links between them, and how well they do what."""
