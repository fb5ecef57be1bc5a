"""Patches for forks of Megatron-LM, and how a checkout stands to them."""
