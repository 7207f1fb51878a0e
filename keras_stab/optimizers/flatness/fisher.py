"""The Fisher pass of IRE: gradients at labels that the model expects."""

import contextlib

import keras

from keras_stab.backend import devices
from keras_stab.backend import processes
from keras_stab.backend import tracing
from keras_stab.gradients.sampled_labels import SampledLabels

_NOISE_OF_A_RANK = 16777619


class FisherPass:
    """Gradients at labels drawn from the model's own predictions.

    Args:
        generator: A `keras.random.SeedGenerator`. Its state is never moved:
            the numbers drawn depend on the count of updates instead.
        sampler: Function `(outputs, seed) -> labels`, or `None` to draw the
            labels that the compiled losses stand for.
    """

    def __init__(self, generator, sampler):
        self._generator, self._sampler = generator, sampler

    def seed_at(self, step):
        """The state from which to draw at an update; reads the variable."""
        words = self._generator.state.value
        # Some hundreds of draws fit between two updates.
        step = keras.ops.cast(step, words.dtype)
        return keras.ops.stack([words[0], words[1] + step * 1024])

    @contextlib.contextmanager
    def drawing_from(self, seed):
        """Yields a seed for `keras.random` that starts at a given state."""
        with keras.StatelessScope([(self._generator.state, seed)]):
            yield self._generator

    def roots(self, oracle, seed):
        """The gradients, and the number of labels behind them.

        Args:
            seed: What `seed_at` returned outside of the oracle, in which
                another scope is in force.
        """
        gradients, count = self._gradients(oracle, seed)
        return [tracing.densify(g) for g in gradients], count

    def _gradients(self, oracle, seed):
        if self._sampler is None:
            labels = SampledLabels(oracle.model, self._generator, seed)
            if oracle.has_forward:
                gradients = oracle.gradient_of_outputs(labels)
            else:
                gradients = oracle.with_loss(labels).gradient()
            return gradients, _count(labels)

        # Each process has rows, and so labels, of its own.
        words = keras.ops.convert_to_tensor(
            [devices.rank() * _NOISE_OF_A_RANK, 0], dtype=seed.dtype
        )
        seed = seed + words

        def sampler(y, y_pred):
            with self.drawing_from(seed) as generator:
                return self._sampler(y_pred, generator)

        oracle = oracle.with_labels(sampler).with_compiled_loss()
        return oracle.gradient(), 1.0


def _count(labels):
    # Known after the gradient: it is set when the loss is called.
    count = keras.ops.cast(labels.count, "float32")
    if devices.ranks() > 1:
        (count,) = processes.sum_each([count])
    return count
