"""Which weights of a DiT the optimisers take for matrices, and how fused ones split.

The one place where the model meets the optimisers; `fusionopt_jax.dit` itself imports
neither them nor this module, so it is asked for by name.

Example:
    >>> import jax
    >>> from fusionopt_jax import dit
    >>> shapes = jax.eval_shape(lambda: dit.init_params(dit.CONFIGS["DiT-S/2"]))
    >>> labels = ROUTING.labels(shapes)
    >>> labels["blocks"]["attn"]["qkv"]["kernel"], labels["t_embedder"]["fc1"]["kernel"]
    ('spectral', 'scalar')
"""

from fusionopt_jax.dit.network.modulation import MODULATED, MODULATOR
from fusionopt_jax.routing import MatrixAxes, Routing, Rule

ROUTING = Routing(
    rules=(
        # A fused kernel is several matrices side by side: each is orthogonalised alone.
        Rule(r"^blocks/attn/qkv/kernel$", axes=MatrixAxes(chunks=3)),
        *(
            Rule(rf"^{part}/{MODULATOR}/kernel$", axes=MatrixAxes(chunks=chunks))
            for part, chunks in MODULATED.items()
        ),
        # What reads pixels, times and labels, and what writes pixels, does not mix
        # hidden features; such layers go to Adam.
        Rule(
            r"^(x_embedder|y_embedder|t_embedder/fc1|final_layer/linear)/",
            label="scalar",
        ),
    ),
    stacked=("blocks",),
)
"""How the tree of `dit.init_params` divides into matrices and the rest."""
