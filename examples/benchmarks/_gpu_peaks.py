"""What GPUs can do at best, by the name that JAX gives to a device.

Dense products with fp32 accumulation, TFLOP/s, from the makers' data sheets (without
sparsity). A device that isn't here has no share of a peak: none is guessed.
"""

import re

# Name in JAX, half precision (fp16 and bf16 alike), TF32, fp32 without tensor cores.
_PEAKS = (
    (r"\bH200 NVL\b", 835.5, 417.5, 60.0),
    (r"\bH200\b", 989.4, 494.7, 66.9),
    (r"\bH100 PCIe\b", 756.0, 378.0, 51.0),
    (r"\bH100 NVL\b", 835.5, 417.5, 60.0),
    (r"\bH100\b", 989.4, 494.7, 66.9),
    (r"\bA100\b", 312.0, 156.0, 19.5),
    (r"\bL4\b", 121.0, 60.0, 30.3),
    (r"\bRTX 4090$", 165.2, 82.6, 82.6),
)


def peak(device_kind: str, dtype: str) -> float | None:
    """TFLOP/s of `"fp16"`, `"bf16"`, `"tf32"` or `"fp32"`, where they are known."""
    column = {"fp16": 0, "bf16": 0, "tf32": 1, "fp32": 2}[dtype]
    for pattern, *values in _PEAKS:
        if re.search(pattern, device_kind):
            return values[column]
    return None
