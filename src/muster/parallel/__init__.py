"""Parallelism, applied to a plain model from outside: the world of ranks, the layout, one file a technique."""
