"""What ranks send each other: the traffic meter and its formulas, and compression of gradients and parameters."""
