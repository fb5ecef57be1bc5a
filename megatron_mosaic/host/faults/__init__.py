"""Finds ranks that died, raised or hang, and ends the others with their names."""
