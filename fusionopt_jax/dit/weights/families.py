"""Which model weights belong to, by their names: a DiT's, and in whose naming, or not.

The names of other families are looked for in the two forms in which people have them:
diffusers', and that of the code the model was published with.
"""

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

Naming: TypeAlias = Literal["published", "diffusers"]

_READERS: dict[Naming, str] = {
    "published": (
        "these weights have the names of the published PyTorch code; `from_pytorch` "
        "reads them."
    ),
    "diffusers": (
        "these weights have the names of diffusers; `from_diffusers` reads them, from "
        "the folder that holds them and their config.json."
    ),
}

_PREFIX = r"(?:module\.|model\.diffusion_model\.|diffusion_model\.|transformer\.)*"

_FAMILIES = {
    # Flux has an entry named as Stable Diffusion 3 has it, so it comes first.
    "a Flux model": r"single_transformer_blocks\.|double_blocks\.|single_blocks\.",
    "a Stable Diffusion 3 model": r"context_embedder\.|joint_blocks\.",
    "a PixArt model": (
        r"adaln_single\.|caption_projection\.|t_block\.|y_embedder\.y_proj\.|"
        r"blocks\.\d+\.(cross_attn\.|scale_shift_table)"
    ),
    "a U-Net": (
        r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\."
    ),
    "an autoencoder (VAE)": (
        r"(first_stage_model\.)?((encoder|decoder)\.(conv_in|conv_out|mid|down|up)|"
        r"(post_)?quant_conv)"
    ),
}
"""What a model of another family is called, and how a name of its begins."""

CLASSES = {
    "FluxTransformer2DModel": "a Flux model",
    "SD3Transformer2DModel": "a Stable Diffusion 3 model",
    "PixArtTransformer2DModel": "a PixArt model",
    "UNet2DConditionModel": "a U-Net",
    "UNet2DModel": "a U-Net",
    "AutoencoderKL": "an autoencoder (VAE)",
}
"""The families by their class in diffusers."""


def refusal(family: str) -> str:
    """What to say of a model of another family.

    Args:
        family: With its article.

    Returns:
        A sentence.

    Example:
        >>> refusal("a Flux model")
        'these are the weights of a Flux model, not of a DiT.'
    """
    text = f"these are the weights of {family}, not of a DiT"
    if family == "an autoencoder (VAE)":
        return f"{text}; `latents.from_diffusers` reads a decoder."
    return f"{text}."


def check_family(names: Iterable[str], naming: Naming) -> None:
    """Refuse weights of another family, and a DiT's in the other naming.

    Args:
        names: Of the weights.
        naming: The naming that is about to be read.

    Raises:
        ValueError: If they are known to be something else, with what they are and what
            reads them. Names that nothing is known of pass.

    Example:
        >>> check_family(["double_blocks.0.img_attn.qkv.weight"], "published")
        Traceback (most recent call last):
        ...
        ValueError: these are the weights of a Flux model, not of a DiT.
    """
    names = list(names)
    for family, pattern in _FAMILIES.items():
        known = re.compile(f"{_PREFIX}(?:{pattern})")
        if any(known.match(name) for name in names):
            raise ValueError(refusal(family))
    other: Naming = "published" if naming == "diffusers" else "diffusers"
    sign = {"published": r"blocks\.\d+\.attn\.qkv\.", "diffusers": "transformer_blocks"}
    if any(re.match(_PREFIX + sign[other], name) for name in names):
        raise ValueError(_READERS[other])
