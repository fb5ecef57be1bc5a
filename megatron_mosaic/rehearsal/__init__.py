"""Runs a plan made for a cluster on this machine, before anyone books the cluster."""
