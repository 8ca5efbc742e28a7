"""A sampler as one file that runs without this library."""
