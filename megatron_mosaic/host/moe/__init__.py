"""Mixture of experts: what their ranks exchange, and what their routers report."""
