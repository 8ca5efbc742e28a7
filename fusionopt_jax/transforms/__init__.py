"""The components: one file, one paper, one Optax transformation."""
