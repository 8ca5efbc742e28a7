"""The sizes of a diffusion transformer, checked once, and the published ones."""

import dataclasses

from fusionopt_jax._checks import (
    check_choice,
    check_integer,
    check_number,
    check_positive,
)

TIME_FEATURES = 256
"""Width of the sinusoidal time features, the same in every published model."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    r"""Sizes of a diffusion transformer with adaLN-Zero conditioning.

    The number of tokens is :math:`T = (\text{input\_size} / \text{patch\_size})^2`.
    A config is hashable, so it can be a static argument of `jax.jit`.

    Args:
        input_size: Height and width of the (latent) image in pixels; divisible by
            `patch_size`. 32 is a 256-pixel image behind an 8-fold autoencoder.
        patch_size: Side of a patch in pixels; halving it quadruples the tokens.
        in_channels: Channels of the image; 4 for the usual latents.
        hidden_size: Width of a token; divisible by `num_heads` and by 4 (the position
            embedding fills four equal parts).
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of a block's MLP, in units of `hidden_size`.
        class_dropout_prob: Chance that training replaces a label by the null label, in
            [0, 1]. With 0 there is no null label, hence no guidance.
        num_classes: Number of classes; labels are 0 to `num_classes - 1`.
        learn_sigma: Whether the network also predicts the variance (twice the output
            channels), as the published models do. False for rectified flow.
        time_scale: Factor on the times before their embedding. 1 suits every model that
            was trained on times 0 to 999 (flow times are handed over as 1000 t); 0.001
            suits a flow model that embedded t in [0, 1] itself.
        frequency_shift: 0 or 1: the time features have the frequencies
            10000^(-i / (128 - frequency_shift)) with i from 0 to 127. 0 is the
            published code, with which the released weights were trained; 1 is what
            diffusers computes, for models that were trained there.
        norm_eps: Added to the variance by the norm before each MLP. 1e-6 is the
            published code; diffusers takes it from `config.json`, with 1e-5 where that
            says nothing. The other norms add 1e-6 in both.

    Raises:
        ValueError: If a size is out of range or does not divide another.
        TypeError: If a size is not a number of the right kind.

    Example:
        >>> config = DiTConfig(hidden_size=64, depth=2, num_heads=4, num_classes=10)
        >>> config.num_tokens, config.out_channels, config.null_label
        (256, 8, 10)

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers"
    (arXiv 2212.09748), section 3. `time_scale` is ours; `frequency_shift` and
    `norm_eps` say where diffusers' `DiTTransformer2DModel` differs.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    time_scale: float = 1.0
    frequency_shift: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check every size and how they divide each other."""
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_classes",
        ):
            check_integer(name, getattr(self, name), low=1)
        check_positive("mlp_ratio", self.mlp_ratio)
        check_number("class_dropout_prob", self.class_dropout_prob, low=0.0, high=1.0)
        check_positive("time_scale", self.time_scale)
        check_integer("frequency_shift", self.frequency_shift, low=0)
        check_choice("frequency_shift", self.frequency_shift, (0, 1))
        check_positive("norm_eps", self.norm_eps)
        if not isinstance(self.learn_sigma, bool):
            raise TypeError(
                f"`learn_sigma` must be True or False, got {self.learn_sigma!r}."
            )
        if self.input_size % self.patch_size:
            raise ValueError(
                f"`patch_size` must divide `input_size`, got patch_size="
                f"{self.patch_size} for input_size={self.input_size}."
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"`num_heads` must divide `hidden_size`, got num_heads="
                f"{self.num_heads} for hidden_size={self.hidden_size}."
            )
        if self.hidden_size % 4:
            raise ValueError(
                "`hidden_size` must be divisible by 4 (sines and cosines of row and "
                f"column fill a quarter each), got {self.hidden_size}."
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return self.grid_size**2

    @property
    def mlp_size(self) -> int:
        """Width of a block's MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice the input's if the variance is predicted."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_labels(self) -> int:
        """Rows of the label table: the classes, and the null label if there is one."""
        return self.num_classes + (1 if self.class_dropout_prob > 0 else 0)

    @property
    def has_null_label(self) -> bool:
        """Whether the model was trained with dropped labels, so can be guided."""
        return self.class_dropout_prob > 0

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"; the last row of the label table."""
        if not self.has_null_label:
            raise ValueError(
                "this model has no null label, because `class_dropout_prob` is 0; "
                "sample it with cfg_scale=1.0, or train with `class_dropout_prob` "
                "above 0."
            )
        return self.num_classes


def differences(kept: DiTConfig, used: DiTConfig, where: str) -> str:
    """The fields in which two configs differ, for an error.

    Args:
        kept: The config that something was made for.
        used: The one that it is used with.
        where: Where the first is kept, such as "in the cache".
    """
    names = [field.name for field in dataclasses.fields(DiTConfig)]
    return ", ".join(
        f"{name} ({getattr(kept, name)} {where}, {getattr(used, name)} in use)"
        for name in names
        if getattr(kept, name) != getattr(used, name)
    )


_PUBLISHED = {
    "S": DiTConfig(hidden_size=384, depth=12, num_heads=6),
    "B": DiTConfig(hidden_size=768, depth=12, num_heads=12),
    "L": DiTConfig(hidden_size=1024, depth=24, num_heads=16),
    "XL": DiTConfig(hidden_size=1152, depth=28, num_heads=16),
}

CONFIGS: dict[str, DiTConfig] = {
    f"DiT-{name}/{patch_size}": dataclasses.replace(config, patch_size=patch_size)
    for name, config in _PUBLISHED.items()
    for patch_size in (2, 4, 8)
}
"""The twelve published models, "DiT-S/2" to "DiT-XL/8" (arXiv 2212.09748, table 1)."""
