"""Which layout: the legal space, the search through it, and the reasons for its answer."""
