"""A walk that recalls residuals, replayed one evaluation at a time in float64.

A skipped evaluation extends the polynomial through the residuals that were computed
last, by Newton's divided differences, formed anew from all the values each time.
"""


def divided_difference(times, values):
    """Of all the points that are given, by its recursive definition."""
    if len(times) == 1:
        return values[0]
    first = divided_difference(times[1:], values[1:])
    last = divided_difference(times[:-1], values[:-1])
    return (first - last) / (times[-1] - times[0])


def newton(times, values, time):
    """The polynomial through the points, newest first, at another time."""
    total, product = 0.0, 1.0
    for count in range(1, len(times) + 1):
        total = total + divided_difference(times[:count], values[:count]) * product
        product = product * (time - times[count - 1])
    return total


class Replay:
    """Residuals by name, each with the mask of its steps.

    `recall(name, step, time, compute)` is the residual of an evaluation: computed and
    recorded, or extrapolated from the last `order + 1` that were recorded.
    """

    def __init__(self, masks, order):
        self.masks, self.order = masks, order
        self.recorded = {}

    def recall(self, name, step, time, compute, kind=None):
        """Of the mask of `kind`, which is the name's own unless it is given."""
        points = self.recorded.setdefault(name, [])
        mask = self.masks.get(name if kind is None else kind)
        if mask is None or mask[step]:
            value = compute()
            points.insert(0, (time, value))
            return value
        times, values = zip(*points[: self.order + 1], strict=True)
        return newton(times, values, time)
