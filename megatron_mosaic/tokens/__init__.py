"""Who attends to whom: masks of sequences as segments, tiles that a kernel computes, and which
context-parallel rank keeps which tokens.
"""
