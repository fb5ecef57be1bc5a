"""Measurements: each module measures one subject and writes one file of ``results/``."""
