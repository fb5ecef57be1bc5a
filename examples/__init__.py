"""Complete runs of Megatron Mosaic."""
