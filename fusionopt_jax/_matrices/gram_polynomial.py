r"""One polynomial of the Gram matrix, in as few products as there can be.

All of Newton–Schulz in Gram form is one polynomial :math:`q` of :math:`R = XX^\top`,
:math:`X \leftarrow q(R)\,X`. Five quintic steps need 17 products of :math:`m \times m`
matrices for theirs, since each hands :math:`R` and :math:`Q` on. Whatever :math:`N`
products can compute is a table (Jarlebring & Lorentzon, arXiv 2504.01500): with
:math:`Y_0 = I` and :math:`Y_1 = 2R - I`,

.. math::
    Y_{i+1} = \Bigl(\sum_{j=0}^i a_{ij} Y_j\Bigr)\Bigl(\sum_{j=0}^i b_{ij} Y_j\Bigr),
    \quad i = 1 \dots N, \qquad q(R) = \sum_{j=0}^{N+1} c_j Y_j .

fp16 can't hold an :math:`R` whose eigenvalues span six orders of magnitude. There
:math:`X` goes through two polynomials, each of its own :math:`R`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

Row: TypeAlias = tuple[float, ...]


class GramPolynomial(NamedTuple):
    """A polynomial as its table.

    Attributes:
        factors: :math:`a_i` and :math:`b_i` of each product.
        output: :math:`c`.
    """

    factors: tuple[tuple[Row, Row], ...]
    output: Row

    @property
    def products(self) -> int:
        """How many products of m × m matrices it takes."""
        return len(self.factors)


class GramMinimax(NamedTuple):
    """What brings every singular value near 1.

    Attributes:
        whole: One polynomial, for fp32.
        halves: Two one after the other, for fp16.
    """

    whole: GramPolynomial
    halves: tuple[GramPolynomial, ...]


def evaluate(
    polynomial: GramPolynomial,
    R: Float[Array, "*batch m m"],
    dot: Callable[[Array, Array], Array],
) -> Float[Array, "*batch m m"]:
    """q(R), for singular values of X up to 1; `dot` multiplies two matrices."""
    identity = jnp.broadcast_to(jnp.eye(R.shape[-1], dtype=R.dtype), R.shape)
    Y = [identity, 2 * R - identity]
    for a, b in polynomial.factors:
        Y.append(dot(_sum(a, Y), _sum(b, Y)))
    return _sum(polynomial.output, Y)


def evaluate_apart(
    polynomial: GramPolynomial,
    R: Float[Array, "*batch m m"],
    dot: Callable[[Array, Array], Array],
) -> tuple[Float[Array, "*batch 1 1"], Float[Array, "*batch m m"]]:
    """The mean eigenvalue μ of q(R), and q(R) − μI.

    Rounded, a large multiple of the identity would take the last bits of what is beside
    it. So each Y is kept as sI + M, and `dot` multiplies the M alone:
    (sI + M)(tI + N) = stI + sN + tM + MN.
    """
    identity = jnp.broadcast_to(jnp.eye(R.shape[-1], dtype=R.dtype), R.shape)
    mean = _mean_eigenvalue(R)
    # Y = sI + M: the s, and the M but for that of Y_0 = I. Where R is near a multiple
    # of the identity, every M is small.
    multiples, rests = [jnp.ones_like(mean), 2 * mean - 1], [2 * (R - mean * identity)]
    for a, b in polynomial.factors:
        s, t = _sum(a, multiples), _sum(b, multiples)
        M, N = _sum(a[1:], rests), _sum(b[1:], rests)
        multiples.append(s * t)
        rests.append(s * N + t * M + dot(M, N))
    s, M = _sum(polynomial.output, multiples), _sum(polynomial.output[1:], rests)
    mean = _mean_eigenvalue(M)
    return s + mean, M - mean * identity


def _mean_eigenvalue(R: Float[Array, "*batch m m"]) -> Float[Array, "*batch 1 1"]:
    """Tr R / m."""
    return jnp.trace(R, axis1=-2, axis2=-1)[..., None, None] / R.shape[-1]


def _sum(coefficients: Row, Y: Sequence[Array]) -> Array:
    """Σ_j c_j Y_j."""
    terms = [c * y for c, y in zip(coefficients, Y, strict=True) if c]
    return sum(terms[1:], terms[0])


# The first two are from `examples/derivations/gram_polynomial.py`: |σ q(σ²) − 1| ≤ 0.1
# for σ in [1e-3, 1], and for σ in [5e-3, 1], since AOL leaves singular values
# several times as large as the norm does (`--low 5e-3 --steps 3 3 --products 8`). The
# halves are from `half_precision.py`, and from the same with `--aol`.
# fmt: off
_WHOLE = GramPolynomial(
    factors=(
        ((-0.159808543, 1.42818404), (-0.159808539, 1.428184)),
        ((-1.18861006, 0.574828871, 1.40674753), (-1.26214837, 0.505620729, 1.977051)),
        (
            (-1.85501762, -0.687374324, -1.14377477, 1.33833989),
            (1.48274048, -0.531712168, -2.44216627, 1.15086895),
        ),
        (
            (1.62287876, -1.90471375, -1.56708215, 0.135736604, 0.498200382),
            (-1.97598439, 8.54894045, -3.68371949, 0.154434889, 2.35198446),
        ),
        (
            (0.541211257, 0.453915137, 0.0, 0.0, -0.0025870171, -0.020520291),
            (3.90217383, 5.09838297, 0.0, 0.783118521, 0.492144704, 2.45055006),
        ),
        (
            (0.0, 0.0, 0.0, 0.0, 0.0177587331, 0.0, 0.0718887028),
            (3.39462198, 0.0, 5.55850851, 0.0, 0.394575315, 2.38493181, -1.32415286),
        ),
        (
            (-1.19151219, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.376937072),
            (0.0, 0.0, 0.0, 0.0, -0.15031153, -0.122006277, 0.0, 0.624681633),
        ),
        (
            (
                0.0, -0.144745469, 0.0, 0.0, -0.018550192, 0.0, 0.0, 0.0941383692,
                0.0653598802,
            ),
            (
                0.0, 7.82965074, 0.0, 0.0, -0.39258843, -0.898554618, 0.0, 2.39325396,
                1.23802608,
            ),
        ),
        (
            (
                0.0, 2.31602076, 4.83669775, 0.0, 0.0, 0.106259054, 0.0, 0.0, 0.0,
                2.03126415,
            ),
            (0.0, 0.0, 0.0, 0.0, 0.0, 0.00751744277, 0.0, 0.0, 0.0, 0.0852865717),
        ),
        (
            (
                -4.95579181, 0.0, -3.05880795, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                0.491578324,
            ),
            (
                -0.0869371232, 0.0, 0.0, 0.0, -0.00354736478, -0.00259753985, 0.0, 0.0,
                0.0, 0.0, 0.208404717,
            ),
        ),
        (
            (
                -0.941238729, 0.0, 0.0, 0.0505276187, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                4.69198527, 1.52991923,
            ),
            (
                0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.128717425, 0.0, 0.0,
                0.235247675,
            ),
        ),
    ),
    output=(
        0.0, 0.0, -0.896900497, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.68273414,
        12.5439972,
    ),
)

_WHOLE_AOL = GramPolynomial(
    factors=(
        ((-0.0304235735, -0.439181013), (-0.0304235735, -0.439181013)),
        (
            (-3.03074111, 2.16904745, 47.3955479),
            (-0.755998864, -1.08617426, 8.51387719),
        ),
        (
            (0.0, -8.56495531, 0.0, -6.81475242),
            (-7.04228076, 13.9660354, 0.0, 7.81064133),
        ),
        (
            (0.349244935, 0.0, 0.0, -0.00616395109, 0.000461961615),
            (0.0, 2.51775042, 0.0, 0.0, -0.0253704121),
        ),
        (
            (-0.0311859509, -0.0608001771, 0.0, 0.0, 0.000273262435, 0.0687290146),
            (0.0, 29.5401976, 0.0, 0.0, -0.246590048, -28.0801085),
        ),
        (
            (3.49271475, 2.31234433, -27.7507885, 0.0, 0.0, 0.0, 8.35272068),
            (
                -0.867732435, 0.0, 13.0952397, 0.0, 0.000204933898, 0.029648783,
                3.93146246,
            ),
        ),
        (
            (
                1.70567533, 4.65323028, -7.46805065, 2.24576542, 0.0, -0.0149860777,
                0.0, 2.41967205,
            ),
            (0.0, 0.0, 0.0, 4.54517397, 0.0, 0.0, 0.0, 5.3436603),
        ),
        (
            (
                4.76530393, 3.72084966, 0.0, 1.43383935, 0.0, 0.0, 15.1693383,
                1.59324623, 0.101188993,
            ),
            (
                1.8414647, 0.0, 0.0, 1.74516521, 0.0, 0.0, -14.3777486, 1.9274726,
                0.136122151,
            ),
        ),
    ),
    output=(
        0.0, 0.0, 0.0, 0.0, -0.075399061, -9.87172554, 0.0, 0.0, -8.64648315,
        17.5100589,
    ),
)
_HALVES = (
    GramPolynomial(
        factors=(
            ((-0.164324016, 1.46404724), (-0.164324016, 1.46404724)),
            (
                (-1.30967202, 0.474694454, 1.38517916),
                (-1.37094073, 0.265494413, 1.89001512),
            ),
            (
                (-1.36324029, -0.264086967, -1.09075108, 1.15962923),
                (0.824701001, -0.0690634901, -1.81548488, 1.0123534),
            ),
            (
                (-0.271748864, -1.29156613, -0.795589172, -0.0175349598, 1.10197033),
                (-0.544462681, 1.56699289, -0.526618086, -0.000463802963, 0.718922084),
            ),
        ),
        output=(
            -0.0816132348, -0.00417091346, 0.743660131, 0.00487762081, 0.40129763,
            0.975716734,
        ),
    ),
    GramPolynomial(
        factors=(
            ((-0.222979262, 0.877421437), (-0.222979264, 0.877421437)),
            (
                (-0.659811706, -0.264464408, 1.5303613),
                (-0.725770817, -0.287973133, 1.87196185),
            ),
            (
                (-1.51449903, 0.9609747, -1.14987995, 0.90704317),
                (0.534571787, -0.83312283, -1.25742912, 1.2092533),
            ),
            (
                (-12.0210348, 18.6357025, 0.767433971, -16.2741444, -12.34801),
                (0.63040686, -2.41756306, -0.657769281, 1.70267334, 1.54653085),
            ),
            (
                (
                    3.72650936, -6.27962142, -2.54912876, -1.53745341, 0.310950483,
                    0.754486963,
                ),
                (
                    3.30213375, 12.2644774, -10.08107, -2.53390017, 3.26334722,
                    2.91673563,
                ),
            ),
        ),
        output=(
            -2.54747548, 1.42368086, 39.4349537, 5.33771413, -1.25764775, -2.58058573,
            0.22584386,
        ),
    ),
)

_HALVES_AOL = (
    GramPolynomial(
        factors=(
            ((-0.0222571348, -0.444730453), (-0.0222571348, -0.444730453)),
            (
                (-1.04339193, 0.414490819, 13.1678789),
                (-0.407862585, -0.873420993, 6.03123331),
            ),
            (
                (-0.208826398, -0.20014345, 0.705089748, -3.37058099),
                (-1.16669767, 0.790820194, 0.746361906, 3.88022762),
            ),
        ),
        output=(0.439713808, -0.346769721, 0.141844001, 0.095100074, -0.813574618),
    ),
    GramPolynomial(
        factors=(
            ((-0.399123043, 1.08846193), (-0.399123043, 1.08846193)),
            (
                (-1.09299306, -0.281910622, 1.50103735),
                (-2.05714363, 0.19272622, 1.82243923),
            ),
            (
                (-1.26583784, 0.442896177, 0.150065077, 1.86551035),
                (-0.519187819, -0.0202726508, -0.406064118, 1.32097904),
            ),
            (
                (2.57523626, -0.277240071, 0.282095409, -2.7771946, 0.147617767),
                (-0.928324171, 0.781069974, -0.776745508, 4.95150648, 0.392736445),
            ),
        ),
        output=(
            0.0916282361, -0.699250783, 1.05417543, 0.0397210698, 2.80715855,
            0.558045155,
        ),
    ),
)
# fmt: on

GRAM_MINIMAX = GramMinimax(_WHOLE, _HALVES)
GRAM_MINIMAX_AOL = GramMinimax(_WHOLE_AOL, _HALVES_AOL)

# On what is multiplied in halves, of an X of norm 1, and on their q(R) − μI: fp16's
# range is shared out by it.
LARGEST_FACTOR = 100.0
