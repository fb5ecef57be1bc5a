"""Which layout: the legal space, the search through it, and the reasons for its answer.

In the order of the work: ``problem`` is asked; ``legal_sizes`` and ``placements`` are the space;
``candidate`` is one of it, ``partition`` splits its layers, ``estimate`` and ``closed_form`` say
what it costs; ``bounds``, ``search`` and ``encoder_search`` find the best ones, and ``rerank``
simulates them; ``planner`` answers, with ``prediction``, ``explanation`` and ``sensitivity``, or
with what is ``infeasible``; ``emit`` writes the answer for others.
"""
