"""A vision-language model that learns to name real handwritten digits."""
