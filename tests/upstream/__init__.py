"""Megatron-LM's own script from checkouts, with and without plans and patches."""
