"""What a step of a large network costs on each of many devices, from formulas.

Everything is per device, of parameters that are divided among all devices (FSDP), with
the matrices of equal layers stacked. `docs/scaling.md` derives the formulas and names
what they leave out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fusionopt_jax._codec import scales_shape
from fusionopt_jax._matrices.newton_schulz import (
    HotDtype,
    cheaper_method,
    coefficient_table,
    newton_schulz_flops,
)

SF_NORMUON = ("ns5", "normuon", "sf")
FULL_SET = ("ns5", "normuon", "sf", "mona", "shampoo")
FP32 = 4
# Above this ratio of sides KL-Shampoo keeps a factor of the shorter side alone.
BOTH_SIDES = 1.5
# Bytes of a momentum and of an average by `state_dtype`, without the scales of blocks.
STATE_DTYPES = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2)}


class Stack(NamedTuple):
    """Equal matrices of all layers, one leaf.

    Attributes:
        count: how many.
        inputs: rows.
        outputs: columns.
        tokenwise: whether every token passes through them, or only every sequence.
    """

    count: int
    inputs: int
    outputs: int
    tokenwise: bool = True

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return self.count * self.inputs * self.outputs

    @property
    def sides(self) -> tuple[int, int]:
        """The shorter side m and the longer n."""
        m, n = sorted((self.inputs, self.outputs))
        return m, n


class Network(NamedTuple):
    """A network as its optimiser sees it.

    Attributes:
        stacks: the matrices, by the names of their leaves.
        rest: numbers in all other leaves, which get Adam.
        width: of the residual stream.
        depth: number of blocks.
        sequence: tokens in a sequence.
        tokenwise_rest: numbers of the rest that every token is multiplied by.
    """

    stacks: dict[str, Stack]
    rest: int
    width: int
    depth: int
    sequence: int
    tokenwise_rest: int = 0

    @property
    def matrices(self) -> int:
        """Numbers in all matrices."""
        return sum(stack.size for stack in self.stacks.values())

    @property
    def size(self) -> int:
        """Numbers in all parameters."""
        return self.matrices + self.rest


def transformer(width: int, depth: int, *, vocabulary: int = 32768) -> Network:
    """A decoder with fused qkv, an MLP of four widths and a table for both ends."""
    return Network(
        _block(width, depth),
        rest=vocabulary * width + 2 * depth * width,
        width=width,
        depth=depth,
        sequence=2048,
        tokenwise_rest=vocabulary * width,
    )


def diffusion_transformer(width: int, depth: int) -> Network:
    """A DiT: such blocks, with a modulation of six widths for each image."""
    stacks = _block(width, depth)
    stacks["modulation"] = Stack(depth, width, 6 * width, tokenwise=False)
    # Biases of all matrices, and the embeddings of 1001 labels.
    rest = depth * 15 * width + 1001 * width
    return Network(stacks, rest=rest, width=width, depth=depth, sequence=256)


def _block(width: int, depth: int) -> dict[str, Stack]:
    return {
        "qkv": Stack(depth, width, 3 * width),
        "proj": Stack(depth, width, width),
        "up": Stack(depth, width, 4 * width),
        "down": Stack(depth, 4 * width, width),
    }


NETWORKS = {
    "transformer 0.1 B": transformer(768, 12),
    "transformer 1 B": transformer(2048, 20),
    "transformer 10 B": transformer(5120, 32),
    "DiT 0.1 B": diffusion_transformer(768, 12),
    "DiT 1 B": diffusion_transformer(1408, 28),
    "DiT 10 B": diffusion_transformer(3712, 40),
}


class Cost(NamedTuple):
    """Of one step, on each device.

    Attributes:
        parameters: bytes.
        gradients: bytes.
        state: bytes of the optimiser's state.
        temporaries: an upper bound of the bytes that the optimiser needs besides.
        optimiser_flops: of the optimiser's matrix products in the iterations.
        preconditioner_flops: of KL-Shampoo's, in full fp32.
        training_flops: of loss and gradients.
        optimiser_bytes: that the device receives for the optimiser.
        training_bytes: that it receives of parameters and gradients.
    """

    parameters: float
    gradients: float
    state: float
    temporaries: float
    optimiser_flops: float
    preconditioner_flops: float
    training_flops: float
    optimiser_bytes: float
    training_bytes: float


def cost(
    network: Network,
    components: Sequence[str],
    devices: int,
    *,
    tokens: int = 8192,
    hot_dtype: HotDtype = "bf16",
    update_every: int = 10,
    state_dtype: str = "fp32",
) -> Cost:
    """What each of `devices` pays for a step.

    Args:
        network: What is trained.
        components: Of `fusion_opt`.
        devices: How many share the parameters.
        tokens: Of the batch, on each device.
        hot_dtype: Of the Newton-Schulz iterations.
        update_every: Steps between two renewals of a basis.
        state_dtype: What momentum and averages are kept in.
    """
    shampoo = "shampoo" in components
    parameters = FP32 * network.size / devices
    shared = buckets(list(network.stacks.values()), devices)
    return Cost(
        parameters=parameters,
        gradients=parameters,
        state=held_state(network, components, devices, state_dtype),
        temporaries=temporaries(network, components, devices),
        optimiser_flops=sum(
            share(stack, devices) * orthogonalising(stack, hot_dtype)
            for stack in shared
        ),
        preconditioner_flops=shampoo
        * sum(
            share(stack, devices) * preconditioning(stack, update_every)
            for stack in shared
        ),
        training_flops=training(network, tokens),
        optimiser_bytes=sum(
            exchanged(stack, devices, shampoo=shampoo) for stack in shared
        ),
        # Parameters are collected twice, forwards and backwards, gradients summed once.
        training_bytes=3 * FP32 * network.size * (1 - 1 / devices),
    )


def held_state(
    network: Network, components: Sequence[str], devices: int, state_dtype: str
) -> float:
    """Bytes of the optimiser's state on each device."""
    stacks = network.stacks.values()
    momentum, average = STATE_DTYPES[state_dtype]
    z = FP32 * ("sf" in components)
    divided = (momentum + z + average * ("mona" in components)) * network.matrices
    divided += (2 * average + z) * network.rest
    if state_dtype == "int8":
        divided += FP32 * sum(
            math.prod(scales_shape((stack.count, stack.inputs, stack.outputs)))
            for stack in stacks
        )
    if "shampoo" in components:
        divided += FP32 * sum(map(kronecker_sizes, stacks))
    # NorMuon's numbers of neurons are on every device.
    return divided / devices + FP32 * sum(
        stack.count * stack.outputs for stack in stacks
    )


def buckets(stacks: Sequence[Stack], devices: int) -> list[Stack]:
    """Stacks as they are computed: short ones of equal matrices are joined."""
    alone = [stack for stack in stacks if stack.count >= devices]
    joined: dict[tuple[int, int], int] = {}
    for stack in stacks:
        if stack.count < devices:
            joined[stack.sides] = joined.get(stack.sides, 0) + stack.count
    return alone + [Stack(count, *sides) for sides, count in joined.items()]


def share(stack: Stack, devices: int) -> int:
    """How many of its matrices the busiest device has."""
    return math.ceil(stack.count / devices)


def orthogonalising(stack: Stack, hot_dtype: HotDtype) -> int:
    """Operations of five Newton-Schulz steps of one matrix."""
    table = coefficient_table("polar_express", 5)
    method = cheaper_method(*stack.sides, table, hot_dtype)
    return newton_schulz_flops(*stack.sides, table, method, hot_dtype)


def both_sides(stack: Stack) -> bool:
    """Whether KL-Shampoo keeps a factor of each side."""
    m, n = stack.sides
    return n < BOTH_SIDES * m


def preconditioning(stack: Stack, update_every: int) -> float:
    """Operations of KL-Shampoo for one matrix, renewals spread over the steps."""
    m, n = stack.sides
    # A power step, two passes of Cholesky-QR and its check.
    renewal = lambda d: (2 + 2 * (2 + 1 / 3 + 1) + 2) * d**3 / update_every  # noqa: E731
    if not both_sides(stack):
        # Q diag Q', its product with M; Q'G and G G'.
        return 2 * m**3 + 6 * m * m * n + renewal(m)
    # To the eigenbases and back; the same there for G; both statistics.
    return 8 * m * n * (m + n) + renewal(m) + renewal(n)


def kronecker_sizes(stack: Stack) -> int:
    """Numbers in the factors, bases and eigenvalues of a stack."""
    m, n = stack.sides
    sides = (m, n) if both_sides(stack) else (m,)
    even = [d + d % 2 for d in sides]
    packed = sum((d + 1) * (d // 2) for d in even)
    return stack.count * (packed + sum(d * d + d for d in sides))


def exchanged(stack: Stack, devices: int, *, shampoo: bool) -> float:
    """Bytes that a device receives for a bucket: all-to-all, in and back."""
    m, n = stack.sides
    received = FP32 * share(stack, devices) * (1 - 1 / devices)
    # The momentum in and the direction back; the gradient where factors learn from it.
    total = (3 if shampoo else 2) * received * m * n
    if shampoo and stack.count % devices:
        # Factors and bases that can't stay with whole matrices travel as well.
        total += 2 * received * kronecker_sizes(stack._replace(count=1))
    return total


def temporaries(network: Network, components: Sequence[str], devices: int) -> float:
    """An upper bound of the bytes that an optimiser's step allocates.

    The directions of all its parameters, and what the two busiest buckets need: one is
    exchanged while the other is computed.
    """
    shampoo = "shampoo" in components

    def working(stack: Stack) -> float:
        m, n = stack.sides
        # In and out, each before and after its exchange, and the iterate; the products.
        numbers = 5 * m * n + 6 * m * m
        if shampoo:
            numbers += 5 * m * n + 3 * kronecker_sizes(stack._replace(count=1))
        return FP32 * share(stack, devices) * numbers

    needed = sorted(map(working, buckets(list(network.stacks.values()), devices)))
    return FP32 * network.size / devices + sum(needed[-2:])


def training(network: Network, tokens: int) -> float:
    """Operations of loss and gradients: two a weight forwards, four backwards."""
    weights = sum(stack.size for stack in network.stacks.values() if stack.tokenwise)
    sequences = tokens / network.sequence
    rest = network.matrices - weights
    attention = 12 * network.depth * network.width * network.sequence * tokens
    return 6 * ((weights + network.tokenwise_rest) * tokens + rest * sequences) + (
        attention
    )
