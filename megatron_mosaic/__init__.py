"""Megatron Mosaic: every module of a multimodal model with a layout of its own."""

__version__ = "0.1.0"
