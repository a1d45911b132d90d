"""Model math: one decoder-only transformer for every family. Knows nothing of ranks, runs or training."""
