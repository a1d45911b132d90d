"""Faults on purpose: drawn by a seed, injected for real into a run that this process started, and what became of it."""
