"""How the tests compile: fast, and where it matters as users do.

Most of the time of the tests is XLA's. Without its optimisations, and with its older
emitters, it compiles these small programs several times as fast; without threads of
its own it leaves the other cores to other workers. In an environment with
`XLA_FLAGS=--xla_cpu_use_fusion_emitters=true` it compiles every program as for users.
"""

import os
import subprocess
import sys

import jax

_OFF = ("xla_cpu_use_fusion_emitters", "xla_cpu_multi_thread_eigen")


def compile_fast() -> None:
    """Set all of this, before any backend starts."""
    given = os.environ.get("XLA_FLAGS", "")
    if f"--{_OFF[0]}=true" in given:
        return
    jax.config.update("jax_disable_most_optimizations", True)
    flags = [f"--{name}=false" for name in _OFF if name not in given]
    if not flags:
        return  # A worker has the environment of what started it.
    environment = os.environ | {"XLA_FLAGS": " ".join([given, *flags])}
    # XLA ends a process that asks for a flag of another release.
    known = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices('cpu')"],
        env=environment,
        capture_output=True,
        check=False,
    )
    if known.returncode == 0:
        os.environ.update(environment)


def as_users() -> dict[str, bool]:
    """Compiler options that undo the flags for one program."""
    given = os.environ.get("XLA_FLAGS", "")
    return {name: True for name in _OFF if f"--{name}=false" in given}
