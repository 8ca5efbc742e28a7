"""Everything that waits for a GPU, in one command and at most eight minutes.

    python examples/benchmarks/on_gpu.py            # on a machine with a GPU
    python examples/benchmarks/on_gpu.py --small    # tiny shapes, on any: does it run?

The optimizer step, Newton-Schulz in fp16, bf16 and fp32 and its share of the device's
peak, loops against batches, sampling with a DiT-XL/2 with the cache of modulators and
without it, a training step. It writes `on_gpu.json`, `on_gpu.md` (the table) and
`on_gpu.png` with the device's name, and says which defaults its figures contradict.

Each group of rows runs in a process of its own, which gives its memory back, and has
its share of the time. What there was no time for, or what failed, is named in the
table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _measure as measure
from matplotlib.figure import Figure

# Seconds of each group, in the order of `_gpu_rows.GROUPS`; what one leaves is the
# next one's. With the first look at the device they are 7.5 minutes.
SHARES = {
    "Newton-Schulz": 90,
    "sampler, DiT-XL/2": 110,
    "optimizer step, DiT-B/2": 100,
    "loop and batch, DiT-B/2": 70,
    "training step, DiT-B/2": 70,
}
DEVICE, DEVICE_SECONDS = "device", 30
GOALS = {"share of peak": 70.0, "saved at batch 1": 25.0, "lost at batch 64": -1.0}

Group = dict[str, Any]


def main(
    arguments: Sequence[str] | None = None,
    run: Callable[[str, argparse.Namespace, float], Group] | None = None,
) -> dict[str, Any]:
    """Measures, prints, writes.

    Args:
        arguments: Of the command line.
        run: Measures one group; by default in a process of its own.
    """
    parser = measure.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, anywhere")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.group:
        measure_here(options.group, options, options.seconds)
        return {}
    run = run or in_a_process
    looked = run(DEVICE, options, DEVICE_SECONDS)
    environment = looked.get("environment")
    if environment is None:
        raise SystemExit(f"JAX does not start here: {looked['failed']}")
    if environment["backend"] != "gpu" and not options.small:
        raise SystemExit(
            f"JAX finds no GPU here, only {environment['device']!r} "
            f"({environment['backend']}). On a machine that has one install "
            '`"jax[cuda12]"` (or cuda13) and see that `jax.devices()` lists it; '
            "`--small` runs tiny shapes on whatever there is."
        )
    groups, spare = {}, 0.0
    for name in options.only:
        print(f"{name} ...", flush=True)
        limit, started = SHARES[name] + spare, time.monotonic()
        groups[name] = run(name, options, limit)
        spare = max(limit - (time.monotonic() - started), 0.0)
    result = {
        "environment": environment,
        "small": options.small,
        "groups": groups,
        "contradicted": [] if options.small else contradicted(groups),
        "goals": [] if options.small else goals(groups),
    }
    text = report(result)
    print(text)
    measure.save(options.out, "on_gpu", result)
    (options.out / "on_gpu.md").write_text(text)
    print(f"wrote {options.out / 'on_gpu.md'}")
    plot(options.out, result)
    return result


def measure_here(name: str, options: argparse.Namespace, seconds: float) -> Group:
    """The rows of a group, written after each one: a late end loses only the last."""
    group: Group = {"rows": []}
    if name == DEVICE:
        group["environment"] = measure.environment()
    else:
        # Here, since it starts JAX, which takes the GPU's memory from other processes.
        import _gpu_rows

        plan = _gpu_rows.Plan(
            options.small, options.rounds, time.monotonic() + seconds - 5
        )
        for row in _gpu_rows.GROUPS[name](plan):
            group["rows"].append(row)
            _write(options.out, group)
    _write(options.out, group)
    return group


def in_a_process(name: str, options: argparse.Namespace, seconds: float) -> Group:
    """The same, in a process that is ended when its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--group", name, "--out", folder]
        command += ["--seconds", str(seconds), "--rounds", str(options.rounds)]
        command += ["--small"] * options.small
        failed = None
        try:
            done = subprocess.run(
                command, timeout=seconds, capture_output=True, text=True, check=False
            )
            if done.returncode:
                failed = (done.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            failed = f"not done after {seconds:.0f} s"
        file = Path(folder, "rows.json")
        group = json.loads(file.read_text()) if file.exists() else {"rows": []}
        return group if failed is None else {**group, "failed": failed}


def _write(out: Path, group: Group) -> None:
    """Replaces the file of rows at once: its reader may come at any moment."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.part").write_text(json.dumps(group))
    os.replace(out / "rows.part", out / "rows.json")


def contradicted(groups: Mapping[str, Group]) -> list[str]:
    """The defaults that lose to something else by more than the spread of both."""
    timed = {name: _timed(group) for name, group in groups.items()}
    found = []

    def compare(group: str, default: str, other: str, setting: str) -> None:
        rows = timed.get(group, {})
        if default not in rows or other not in rows:
            return
        one, two = rows[default], rows[other]
        if two["high"] < one["low"]:
            found.append(
                f"{setting}: {other!r} takes {two['ms']:.3g} ms, the default "
                f"{default!r} {one['ms']:.3g} ms"
            )

    stacks = {what.split(",")[0] for what in timed.get("Newton-Schulz", {})}
    for stack in sorted(stacks):
        _, m, n = (int(part) for part in stack.replace("of", "x").split("x"))
        # The form with fewer operations: from an aspect ratio of about 1.5 on.
        form, other = ("gram", "plain") if n > 1.5 * m else ("plain", "gram")
        for dtype in ("bf16", "fp32"):
            compare(
                "Newton-Schulz",
                f"{stack}, fp16, {form}",
                f"{stack}, {dtype}, {form}",
                'ns5(hot_dtype="auto")',
            )
        compare(
            "Newton-Schulz",
            f"{stack}, fp16, {form}",
            f"{stack}, fp16, {other}",
            'ns5(method="auto")',
        )
    for layers in ("stacked blocks", "separate blocks"):
        rows = [w for w in timed.get("loop and batch, DiT-B/2", {}) if layers in w]
        if len(rows) == 2:
            compare("loop and batch, DiT-B/2", *rows, 'ns5(bucketing="auto")')
    for batch in (1, 8, 64):
        compare(
            "sampler, DiT-XL/2",
            f"batch {batch}, scanned, cached",
            f"batch {batch}, unrolled, cached",
            "sample(unroll=False)",
        )
        compare(
            "sampler, DiT-XL/2",
            f"batch {batch}, scanned, cached",
            f"batch {batch}, scanned, computed",
            "the cache of modulators",
        )
    return found


def goals(groups: Mapping[str, Group]) -> list[str]:
    """The goals of docs/performance.md that only a GPU can tell of."""
    found = []
    shares = [
        row["of peak %"]
        for row in groups.get("Newton-Schulz", {"rows": []})["rows"]
        if row.get("of peak %") and "fp16" in row["what"]
    ]
    if shares:
        wanted = GOALS["share of peak"]
        found.append(
            f"ns5 in fp16 reaches {max(shares):.0f} % of the peak (goal {wanted:.0f} %)"
        )
    sampled = _timed(groups.get("sampler, DiT-XL/2", {"rows": []}))
    for batch, goal in ((1, "saved at batch 1"), (64, "lost at batch 64")):
        if row := sampled.get(f"batch {batch}, scanned, cached"):
            found.append(
                f"the cache saves {row['saved %']:.1f} % of a step at batch {batch} "
                f"(goal at least {GOALS[goal]:.0f} %)"
            )
    return found


def report(result: Mapping[str, Any]) -> str:
    """All of it as a page of Markdown."""
    about = result["environment"]
    lines = [f"# {about['device']} ({about['backend']}), JAX {about['jax']}", ""]
    if result["small"]:
        lines += ["Tiny shapes, to try the script on: these figures mean nothing.", ""]
    for name, group in result["groups"].items():
        columns = list(dict.fromkeys(key for row in group["rows"] for key in row))
        lines += [f"## {name}", ""]
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in group["rows"]:
            cells = (measure.cell(row.get(column)) for column in columns)
            lines.append(f"| {' | '.join(cells)} |")
        if "failed" in group:
            lines += ["", f"Not all of it: {group['failed']}"]
        lines.append("")
    for title, words in (
        ("Defaults that these figures contradict", result["contradicted"]),
        ("Goals", result["goals"]),
    ):
        lines += [f"## {title}", ""]
        none = "Not judged by tiny shapes." if result["small"] else "None."
        lines += [f"- {word}" for word in words] or [none]
        lines.append("")
    return "\n".join(lines)


def plot(out: Path, result: Mapping[str, Any]) -> None:
    """Bars of every group, under the name of the device."""
    bars = {
        name: {
            what: (row["ms"], row["low"], row["high"])
            for what, row in _timed(group).items()
        }
        for name, group in result["groups"].items()
    }
    bars = {name: group for name, group in bars.items() if group}
    if not bars:
        return
    heights = [len(group) + 2.2 for group in bars.values()]
    figure = Figure(figsize=(8.5, 0.6 + 0.25 * sum(heights)), layout="constrained")
    subplots = figure.subplots(len(bars), 1, height_ratios=heights, squeeze=False)
    for axes, (name, group) in zip(subplots[:, 0], bars.items(), strict=True):
        unit = "milliseconds a step" if "sampler" in name else "milliseconds"
        measure.draw_bars(axes, group, unit)
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
    small = ", tiny shapes" if result["small"] else ""
    about = result["environment"]
    figure.suptitle(
        f"{about['device']} ({about['backend']}), JAX {about['jax']}{small}\n"
        "median and quartiles",
        fontsize=10,
    )
    measure.save_figure(figure, out, "on_gpu")


def _timed(group: Group) -> dict[str, Any]:
    """The rows that have a time, by what they are of."""
    return {row["what"]: row for row in group["rows"] if "ms" in row}


if __name__ == "__main__":
    main()
