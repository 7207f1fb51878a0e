"""What an exchange of gradients takes on paper, and what it was counted as."""

import statistics
import time

import numpy as np

# Of the K x K problem; the largest that GRAIN takes is 64.
GROUPS = (4, 8, 64)


def sent(what, devices, groups):
    """Bytes that leave one device, over those of the weights.

    Args:
        what: `"mean"`: one all-reduce. `"aligned"`: as many groups as devices,
            each on one. `"spread"`: rows of every group on every device.
    """
    ring = (devices - 1) / devices
    products = 2 * ring * groups**2
    return {
        "mean": (2 * ring, 0),
        # Every gradient cut over the devices; the combination gathered.
        "aligned": (ring + ring, products),
        # K sums, each left cut over the devices; the combination gathered.
        "spread": (groups * ring + ring, products),
    }[what]


def seconds(what, weights, devices, groups, bandwidth, width):
    """Seconds of the exchange in a step, at `bandwidth` bytes a second."""
    gradients, products = sent(what, devices, groups)
    return (gradients * weights * width + products * 4) / bandwidth


def solver_seconds():
    """Median seconds of the K x K problem, on the host and compiled."""
    import jax
    import keras

    import keras_stab

    def in_graph(gram):
        return keras_stab.min_norm_weights(gram).weights

    compiled = jax.jit(in_graph)
    answer = {}
    for groups in GROUPS:
        gradients = np.random.default_rng(1).normal(size=(groups, 4 * groups))
        gram = (gradients @ gradients.T).astype("float32")
        tensor = keras.ops.convert_to_tensor(gram)
        answer[str(groups)] = {
            "host": _median(lambda: keras_stab.min_norm_weights(gram)),
            "compiled": _median(lambda: np.asarray(compiled(tensor))),
        }
    return answer


def _median(function, repeats=200):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
