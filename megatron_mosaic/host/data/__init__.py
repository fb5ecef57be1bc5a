"""Reads the data: every module its own samples of the same global microbatches, one step ahead."""
