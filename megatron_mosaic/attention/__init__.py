"""Computes attention under multimodal masks, on one GPU and over context-parallel ranks."""
