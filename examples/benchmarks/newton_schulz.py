"""How fast and how right is each way to orthogonalise, against an SVD?

    python examples/benchmarks/newton_schulz.py

Times are of a stack of matrices, as a step has them, next to plain products of the same
shapes. Two errors per input: the distance from the same polynomial applied to singular
values in float64 (rounding), and how far the singular values that matter are from 1
(the method). Inputs: a random matrix, one with condition number 1e4, one of rank 16,
and one of size 1e-30.
"""

from typing import Any

import _measure as measure
import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax._matrices import newton_schulz
from fusionopt_jax._matrices.gram_polynomial import GramMinimax, GramPolynomial

SHAPES = ((384, 384), (384, 1152), (384, 1536), (384, 2304))
GPU_SHAPES = (*SHAPES, (768, 3072), (1152, 1152), (1152, 4608), (1152, 6912))
EPS = 1e-38


def variants() -> dict[str, dict[str, Any]]:
    """Settings by name."""
    polar = {"coefficients": "polar_express", "steps": 5}
    quintic = {"coefficients": "quintic", "steps": 5}
    return {
        "quintic plain fp32": {**quintic, "method": "plain", "hot_dtype": "fp32"},
        "quintic gram fp32": {**quintic, "method": "gram", "hot_dtype": "fp32"},
        "polar_express plain fp32": {**polar, "method": "plain", "hot_dtype": "fp32"},
        "polar_express gram fp32": {**polar, "method": "gram", "hot_dtype": "fp32"},
        "one polynomial, fp32": {
            "coefficients": "gram_minimax",
            "steps": 5,
            "method": "gram",
            "hot_dtype": "fp32",
        },
        "AOL, one polynomial, fp32": {
            "coefficients": "gram_minimax",
            "steps": 5,
            "method": "gram",
            "hot_dtype": "fp32",
            "preconditioner": "aol",
        },
        "AOL, 4 steps, fp32": {
            "coefficients": "polar_express",
            "steps": 4,
            "method": "auto",
            "hot_dtype": "fp32",
            "preconditioner": "aol",
        },
        "two polynomials, fp16": {
            "coefficients": "gram_minimax",
            "steps": 5,
            "method": "gram",
            "hot_dtype": "fp16",
        },
        "polar_express gram fp16": {**polar, "method": "gram", "hot_dtype": "fp16"},
        "polar_express gram bf16": {**polar, "method": "gram", "hot_dtype": "bf16"},
        "polar_express plain fp16": {**polar, "method": "plain", "hot_dtype": "fp16"},
        "polar_express plain bf16": {**polar, "method": "plain", "hot_dtype": "bf16"},
    }


def orthogonaliser(settings: dict[str, Any]) -> Any:
    """A function of a stack."""
    settings = dict(settings)
    coefficients = settings.pop("coefficients")
    table = newton_schulz.coefficient_table(
        coefficients,
        settings.pop("steps"),
        preconditioner=settings.get("preconditioner", "frobenius"),
    )
    safety = newton_schulz.safety_factor(coefficients)
    looped = jax.default_backend() == "cpu"

    def orthogonalise(stack: jax.Array) -> jax.Array:
        call = lambda part: newton_schulz.newton_schulz(  # noqa: E731
            part, table, eps=EPS, safety=safety, **settings
        )
        if looped:
            return jax.lax.map(lambda matrix: call(matrix[None])[0], stack)
        return call(stack)

    return orthogonalise


def inputs(m: int, n: int) -> dict[str, np.ndarray]:
    """Matrices that are easy, hard, singular and tiny."""
    random = np.random.default_rng(0)
    dense = random.standard_normal((m, n))
    left, _, right = np.linalg.svd(dense, full_matrices=False)
    with_values = lambda values: (left * values) @ right  # noqa: E731
    return {
        "random": dense,
        "condition 1e4": with_values(np.logspace(0, -4, m)),
        "rank 16": with_values((np.arange(m) < 16).astype(float)),
        "size 1e-30": 1e-30 * dense,
    }


def errors(orthogonalise: Any, settings: dict[str, Any], matrix: np.ndarray) -> Any:
    """Rounding error, and the largest distance of a non-zero singular value from 1."""
    stack = jnp.asarray(matrix, jnp.float32)[None]
    result = np.asarray(jax.jit(orthogonalise)(stack)[0], np.float64)
    # Of what fp32 holds, not of the float64 matrix it was rounded from.
    left, values, right = np.linalg.svd(
        np.asarray(stack[0], np.float64), full_matrices=False
    )
    kept = values > 1e-5 * values[0]
    rounding = None
    if settings.get("preconditioner") != "aol":
        coefficients = settings["coefficients"]
        scaled = (
            values / np.linalg.norm(values) / newton_schulz.safety_factor(coefficients)
        )
        table = newton_schulz.coefficient_table(coefficients, settings["steps"])
        scaled = on_values(table, scaled, settings["hot_dtype"])
        exact = (left * np.where(kept, scaled, 0)) @ right
        rounding = float(np.linalg.norm(result - exact) / np.linalg.norm(exact))
    found = np.linalg.svd(result, compute_uv=False)
    return rounding, float(found[0]), float(found[kept].min())


def on_values(table: Any, values: np.ndarray, hot_dtype: str) -> np.ndarray:
    """The same of singular values, in float64."""
    if isinstance(table, GramMinimax):
        for part in (table.whole,) if hot_dtype == "fp32" else table.halves:
            values = values * polynomial_on_values(part, values)
        return values
    for a, b, c in table:
        values = a * values + b * values**3 + c * values**5
    return values


def polynomial_on_values(polynomial: GramPolynomial, values: np.ndarray) -> np.ndarray:
    """q(σ²), in float64."""
    Y = [np.ones_like(values), 2 * values**2 - 1]
    for a, b in polynomial.factors:
        Y.append((np.asarray(a) @ Y) * (np.asarray(b) @ Y))
    return np.asarray(polynomial.output) @ Y


def main() -> None:
    """Measures, prints, writes."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--count", type=int, default=12, help="matrices in a stack")
    arguments.add_argument("--no-times", action="store_true", help="errors only")
    options = arguments.parse_args()
    backend = jax.default_backend()
    shapes = SHAPES if backend == "cpu" else GPU_SHAPES
    chosen = variants()
    result: dict[str, Any] = {"environment": measure.environment(), "rows": []}

    accuracy = []
    for name, settings in chosen.items():
        for kind, matrix in inputs(384, 1152).items():
            rounding, largest, smallest = errors(
                orthogonaliser(settings), settings, matrix
            )
            accuracy.append(
                {
                    "variant": name,
                    "input": kind,
                    "rounding error": rounding,
                    "largest value": largest,
                    "smallest value": smallest,
                }
            )
    result["accuracy"] = accuracy
    measure.print_table(accuracy)

    if not options.no_times:
        # A CPU simulates half precision, so only its errors count.
        timed = {
            name: settings
            for name, settings in chosen.items()
            if backend != "cpu" or settings["hot_dtype"] == "fp32"
        }
        result["rows"] = time_all(timed, shapes, options)
        measure.print_table(result["rows"])
        largest = f"{shapes[-1][0]} x {shapes[-1][1]}"
        measure.bar_plot(
            options.out,
            "newton_schulz",
            f"{options.count} matrices of {largest}, {result['environment']['device']}",
            "milliseconds",
            {
                row["variant"]: (row["ms"], row["low ms"], row["high ms"])
                for row in result["rows"]
                if row["shape"] == largest
            },
        )
    measure.save(options.out, "newton_schulz", result)


def time_all(
    chosen: dict[str, dict[str, Any]], shapes: Any, options: Any
) -> list[dict[str, Any]]:
    """One row for each variant and shape, beside the plain product of that round."""
    rows = []
    for m, n in shapes:
        stack = jax.random.normal(jax.random.key(0), (options.count, m, n))
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        product, flops = measure.plain_products(m, n, options.count, dtype)
        runs: dict[str, Any] = {"plain product": product}
        for name, settings in chosen.items():
            call = jax.jit(orthogonaliser(settings))
            runs[name] = lambda call=call, stack=stack: call(stack)
        times = measure.interleave(runs, options.rounds)
        rate = flops / times["plain product"].median
        for name, settings in chosen.items():
            table = newton_schulz.coefficient_table(
                settings["coefficients"],
                settings["steps"],
                preconditioner=settings.get("preconditioner", "frobenius"),
            )
            dtype_name = settings["hot_dtype"]
            method = settings["method"]
            if method == "auto":
                method = newton_schulz.cheaper_method(m, n, table, dtype_name)
            work = options.count * newton_schulz.newton_schulz_flops(
                m, n, table, method, dtype_name
            )
            time = times[name]
            rows.append(
                {
                    "shape": f"{m} x {n}",
                    "variant": name,
                    "ms": 1e3 * time.median,
                    "low ms": 1e3 * time.low,
                    "high ms": 1e3 * time.high,
                    "GFLOP/s": work / time.median / 1e9,
                    "of plain product %": 100 * work / time.median / rate,
                }
            )
    return rows


if __name__ == "__main__":
    main()
