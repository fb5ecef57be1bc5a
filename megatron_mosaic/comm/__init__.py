"""How activations and gradients move between layouts."""
