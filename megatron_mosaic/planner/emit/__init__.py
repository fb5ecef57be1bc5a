"""A plan as other programs take it: their arguments, configurations and launch lines."""
