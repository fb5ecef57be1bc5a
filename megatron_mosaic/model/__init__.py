"""What is trained: the geometry of modules and their layers, and how many tokens they see."""
