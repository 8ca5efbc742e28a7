"""From noise and labels to images: samplers, one paper a file, and their loop."""

from fusionopt_jax.dit.sampling.ddim import DDIM
from fusionopt_jax.dit.sampling.ddpm import DDPM
from fusionopt_jax.dit.sampling.dpm_solver import DPMSolverPP2M
from fusionopt_jax.dit.sampling.flow import Euler, Heun
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.sit import SiTSDE

METHODS: tuple[type[Sampler], ...] = (Euler, Heun, SiTSDE, DDPM, DDIM, DPMSolverPP2M)
"""Every sampler of this library; `Sampler` knows each by its short name."""

for _method in METHODS:
    setattr(Sampler, _method.method, _method)
