"""Speed of the kernels against the card's own ceilings and the peers that are installed: `python -m
kernels.benchmarks`."""
