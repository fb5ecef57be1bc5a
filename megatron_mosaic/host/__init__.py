"""Where Mosaic attaches to Megatron: the only importer of megatron."""
