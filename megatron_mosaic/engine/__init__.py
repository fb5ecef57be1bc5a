"""Executes a schedule."""
