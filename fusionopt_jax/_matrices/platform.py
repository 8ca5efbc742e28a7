"""Which version of a program runs: the platform decides that it is compiled for.

Not the one of the process that traces it: `jax.export` makes a program for a GPU on a
machine that has none, and a process that has one compiles for its CPU as well.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias

import jax

Platform: TypeAlias = Literal["cpu", "gpu", "other"]

PLATFORMS: tuple[Platform, ...] = ("cpu", "gpu", "other")
"""All there are; `"other"` is TPUs and what else JAX may come to know."""

# What JAX calls those that it has names for.
_NAMES = {"cpu": ("cpu",), "gpu": ("cuda", "rocm")}


def by_platform(
    function: Callable[..., Any],
    setting: Callable[[Platform], Hashable],
    *args: Any,
    platforms: tuple[Platform, ...] = PLATFORMS,
) -> Any:
    """`function(alike, *args)`, `alike` the platforms that share a setting.

    It is traced once for every setting, and the version of the platform that it is
    compiled for is what reaches the compiler. Outside of `jax.jit` one alone is traced.

    Args:
        function: Its results have the same shapes and dtypes in every version.
        setting: What a platform asks for.
        *args: Trees of arrays.
        platforms: Those that are still to choose between, in the order of `PLATFORMS`:
            within a function that was chosen, its `alike`.
    """
    groups: dict[Hashable, tuple[Platform, ...]] = {}
    for platform in platforms:
        key = setting(platform)
        groups[key] = (*groups.get(key, ()), platform)
    versions = [functools.partial(function, alike) for alike in groups.values()]
    default = versions[-1]
    if len(versions) == 1:
        return default(*args)
    named = {
        name: version
        for version, alike in zip(versions[:-1], groups.values(), strict=False)
        for platform in alike
        for name in _NAMES[platform]
    }
    return jax.lax.platform_dependent(*args, default=default, **named)
