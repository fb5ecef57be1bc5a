"""How much: FLOPs, bytes and seconds of a model under a plan on a cluster."""
