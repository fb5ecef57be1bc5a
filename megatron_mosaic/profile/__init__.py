"""Measures what the user's devices and links do, and writes it as a cluster file."""
