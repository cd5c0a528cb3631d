"""Benchmarks: what Baton costs and gains, measured on the machine at hand."""
