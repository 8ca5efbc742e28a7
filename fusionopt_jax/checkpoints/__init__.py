"""Orbax checkpoints that know what they hold, and notice when they no longer do.

Orbax restores whatever lies under the names it is asked for: into another routing it
puts `None` where a leaf has moved, and of a flipped byte on the disk it knows nothing.
`save` therefore keeps, beside the arrays, a record of the routing, of the optimiser's
components, and of every array's dtype, shape and digest; `restore` compares all of it.
Folders, steps, retention and asynchronous writing are those of the
`orbax.checkpoint.CheckpointManager` that both work on.

Needs the extra `checkpoints`: ``pip install "fusionopt-jax[checkpoints]"``.
"""

try:
    import orbax.checkpoint as _orbax
except ImportError as error:
    raise ImportError(
        "fusionopt_jax.checkpoints needs Orbax, which is not installed; install the "
        'extra `checkpoints`: pip install "fusionopt-jax[checkpoints]".'
    ) from error

from fusionopt_jax.checkpoints.errors import (
    DamagedCheckpointError,
    DamagedCheckpointWarning,
)
from fusionopt_jax.checkpoints.exporting import export_safetensors, weights_digest
from fusionopt_jax.checkpoints.restoring import (
    Restored,
    read_about,
    restore,
    restore_deployed,
)
from fusionopt_jax.checkpoints.saving import save

del _orbax

__all__ = [
    "DamagedCheckpointError",
    "DamagedCheckpointWarning",
    "Restored",
    "export_safetensors",
    "read_about",
    "restore",
    "restore_deployed",
    "save",
    "weights_digest",
]
