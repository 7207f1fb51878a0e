"""The mathematics once more, slow and obvious, in NumPy float64."""

import itertools

import numpy as np


def min_norm_by_enumeration(gram, sizes=None):
    """Tries every support; exact, for up to six groups."""
    gram = np.asarray(gram, "float64")
    groups = len(gram)
    best = None
    for size in range(1, groups + 1):
        for support in itertools.combinations(range(groups), size):
            part = gram[np.ix_(support, support)]
            # Stationarity and the sum, as one linear system.
            system = np.ones((size + 1, size + 1))
            system[:size, :size] = part
            system[size, size] = 0.0
            right = np.zeros(size + 1)
            right[size] = 1.0
            solution = np.linalg.lstsq(system, right, rcond=None)[0][:size]
            if np.any(solution < -1e-9):
                continue
            weights = np.zeros(groups)
            weights[list(support)] = np.maximum(solution, 0.0)
            weights /= weights.sum()
            value = weights @ gram @ weights
            if best is None or value < best[0] - 1e-13:
                best = (value, weights)
    return best[1]


def upgrad_by_enumeration(gram, sizes=None):
    """The mean of the projections on the cone of no conflict, up to 6 groups.

    The projection of g_i: the nearest g_i + sum_j a_j g_j with a >= 0, from
    every set of groups whose a may be positive.
    """
    gram = np.asarray(gram, "float64")
    groups = len(gram)
    total = np.zeros(groups)
    for i in range(groups):
        best = None
        for size in range(groups + 1):
            for support in itertools.combinations(range(groups), size):
                weights = np.eye(groups)[i]
                chosen = list(support)
                if chosen:
                    part = gram[np.ix_(chosen, chosen)]
                    added = np.linalg.lstsq(part, -gram[chosen, i], rcond=None)
                    if np.any(added[0] < -1e-9):
                        continue
                    weights[chosen] += added[0]
                value = weights @ gram @ weights
                if best is None or value < best[0] - 1e-13:
                    best = (value, weights)
        total += best[1] / groups
    return total


def cagrad_of_two(gram, sizes=None, c=0.5):
    """By bisection of the slope of the paper's dual, over the segment."""
    gram = np.asarray(gram, "float64")
    if len(gram) == 1:
        return np.ones(1)
    mean = np.full(2, 0.5)
    length = c * np.sqrt(mean @ gram @ mean)

    def slope(share):
        w, along = np.array([share, 1.0 - share]), np.array([1.0, -1.0])
        slope = length * (along @ gram @ w) / np.sqrt(w @ gram @ w)
        return along @ gram @ mean + slope

    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    w = np.array([low, 1.0 - low])
    return mean + length * w / np.sqrt(w @ gram @ w)


def certificate(gram, weights):
    """`max (|d|^2 - <d, g_k>) / (|g_k| m)` over the groups that count."""
    gram = np.asarray(gram, "float64")
    weights = np.asarray(weights, "float64")
    weights = weights / weights.sum()
    diagonal = np.diag(gram)
    included = diagonal > 1e-14 * diagonal.max()
    roots = np.sqrt(np.where(included, diagonal, 1.0))
    violation = weights @ gram @ weights - gram @ weights
    return np.max((violation / (roots * roots[included].min()))[included])


def assert_no_conflict(direction, group_gradients, tolerance=1e-6):
    """The theorem: `<d, g_k> >= |d|^2` for every group.

    Args:
        direction: List of arrays, one per variable.
        group_gradients: One such list a group.
    """
    d = _flat(direction)
    rows = np.stack([_flat(g) for g in group_gradients])
    norms = np.linalg.norm(rows, axis=1)
    counted = norms > 1e-7 * norms.max()
    slack = tolerance * norms[counted] * norms[counted].min()
    products = rows[counted] @ d
    assert np.all(products >= d @ d - slack), (products, d @ d)


def assert_shorter_than_mean(direction, group_gradients):
    """`|d| <= |mean|` and `|d| <= min |g_k|`."""
    d = np.linalg.norm(_flat(direction))
    rows = np.stack([_flat(g) for g in group_gradients])
    assert d <= np.linalg.norm(rows.mean(axis=0)) * (1 + 1e-5)
    assert d <= np.linalg.norm(rows, axis=1).min() * (1 + 1e-5)


def _flat(tensors):
    return np.concatenate([np.asarray(t, "float64").ravel() for t in tensors])


def clipped_by_unit(gradient, weights, clipping, epsilon):
    """AGC of one tensor, unit by unit: columns, filters, or all of it."""
    gradient = np.array(gradient, "float64")
    weights = np.asarray(weights, "float64")
    if max([1, *gradient.shape]) == gradient.size:
        units = [()]
    elif gradient.ndim < 4:
        rest = itertools.product(*map(range, gradient.shape[1:]))
        units = [(slice(None), *place) for place in rest]
    else:
        units = [(..., k) for k in range(gradient.shape[-1])]
    for unit in units:
        longest = clipping * max(np.linalg.norm(weights[unit]), epsilon)
        length = np.linalg.norm(gradient[unit])
        if length >= longest:
            gradient[unit] *= longest / max(length, 1e-6)
    return gradient


class PercentileLimit:
    """AutoClip: the norm that is allowed, from the last of all norms."""

    def __init__(self, percentile, history_length=1000):
        self.percentile, self.length = percentile, history_length
        self.norms = []

    def __call__(self, norm):
        self.norms = [*self.norms, norm][-self.length :]
        limit = np.percentile(self.norms, self.percentile)
        return limit if norm > limit else None


class ScoreLimit:
    """ZClip: the norm that is allowed to an outlier."""

    def __init__(self, z_threshold=2.5, decay=0.97, warmup_steps=25):
        self.highest, self.decay, self.wait = z_threshold, decay, warmup_steps
        self.first = []

    def __call__(self, norm):
        if len(self.first) < self.wait:
            self.first.append(norm)
            self.mean, self.variance = np.mean(self.first), np.var(self.first)
            return None
        limit, deviation = None, np.sqrt(self.variance)
        score = (norm - self.mean) / (deviation + 1e-6)
        if score > self.highest:
            limit = norm = self.mean + self.highest**2 / score * deviation
        self.mean += (1 - self.decay) * (norm - self.mean)
        square = (norm - self.mean) ** 2
        self.variance += (1 - self.decay) * (square - self.variance)
        return limit


def clipped_by_norm(gradients, limit):
    """All of them, by what a limit says to their norm."""
    norm = np.linalg.norm(_flat(gradients))
    highest = limit(norm)
    factor = 1.0 if highest is None else highest / (norm + 1e-6)
    return [factor * np.asarray(g) for g in gradients]


class LinearRegression:
    """Mean squared error of `x w + b`, with its gradient by hand."""

    def __init__(self, weights, bias):
        self.frozen = {}
        self.parameters = [np.array(weights, float), np.array(bias, float)]

    @property
    def parameters(self):
        return self._parameters

    @parameters.setter
    def parameters(self, values):
        """A frozen one stays, wherever a method would put it."""
        values = list(values)
        for index, value in self.frozen.items():
            values[index] = value
        self._parameters = values

    def freeze(self, index):
        self.frozen[index] = self.parameters[index]

    def gradient(self, x, y):
        kernel, bias = self.parameters
        error = x @ kernel + bias - y
        scale = 2.0 / error.size
        gradients = [scale * x.T @ error, scale * error.sum(axis=0)]
        return [
            0.0 * g if i in self.frozen else g for i, g in enumerate(gradients)
        ]

    def combined_gradient(self, parts, rule=min_norm_by_enumeration):
        """The combination over `(x, y)` parts that a rule of the Gram makes."""
        gradients = [self.gradient(x, y) for x, y in parts]
        rows = np.stack([_flat(g) for g in gradients])
        weights = rule(rows @ rows.T, [len(x) for x, _ in parts])
        return [
            sum(w * g[i] for w, g in zip(weights, gradients))
            for i in range(len(self.parameters))
        ]
