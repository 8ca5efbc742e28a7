"""The commands of `python -m fusionopt_jax.dit`, one a module, and what they share."""
