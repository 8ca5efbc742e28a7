"""What a traced program says of its matrix products."""

import numpy as np
from jax.extend.core import jaxprs_in_params


def flops_of_dots(jaxpr):
    """Two times the products of every matrix product that a program runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = int(np.prod([left[axis] for axis in contract]))
            total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * inner
        for inside in jaxprs_in_params(equation.params):
            total += equation.params.get("length", 1) * flops_of_dots(inside)
    return total
