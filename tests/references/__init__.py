"""Slow float64 NumPy references, written from the papers' equations.

Nothing here imports the package. Matrices are (out, in) as in the papers: rows are
output neurons. Most functions take the whole gradient history at once and return the
whole trajectory, so a test replays a run in one call.
"""
