"""The table of modulators: for any adaLN model, and for this DiT as a case of it."""
