"""How it looks: figures of plans and their predictions."""
