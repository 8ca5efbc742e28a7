"""Matrix numerics: leaves as stacks, calls over many leaves, and the products."""
