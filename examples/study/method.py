"""What a row of the study is: an optimiser, and how it is tuned and run."""

from typing import Any, NamedTuple

from study.optimizers import Build, Setting

DECAYS = (0.05, 0.0, 0.2, 0.4, 0.8)
"""What decays are climbed on; the rates are tried with the first."""


class Method(NamedTuple):
    """One row.

    Attributes:
        title: how tables call it.
        build: the optimiser.
        centre: the learning rate where a climb starts.
        decays: what the decay may be; the climb starts at the first, and only that is
            taken where there is one. That of `base` if empty.
        seeds: how many seeds beside the one that is tuned on.
        base: the row at whose best rate the climb starts, in place of `centre`.
        climbs: whether other rates are tried.
        stretch: how many times longer than the workload's the runs are.
        on: the workloads that it runs on; the four, and larger ones, if empty.
        name: how files and the command line call it.
        part: which question it belongs to.
    """

    title: str
    build: Build
    centre: float = 8e-3
    decays: tuple[float, ...] = DECAYS
    seeds: int = 3
    base: str | None = None
    climbs: bool = True
    stretch: float = 1
    on: tuple[str, ...] = ()
    name: str = ""
    part: str = ""

    def optimizer(
        self, workload: Any, rate: Any, decay: Any, steps: int, params: Any
    ) -> Any:
        """The optimiser for a workload's weights."""
        split = workload.routing, workload.unchunked
        return self.build(Setting(rate, decay, steps, params, *split))
