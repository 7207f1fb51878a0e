"""The door for methods: what your own are built from.

- An aggregation rule is a function from the Gram matrix of group gradients to
  their weights, given to `keras_stab.Aggregate`.
- A method that asks for gradients of its own is a `GradientMethod`; it asks
  the `GradientOracle` of the batch, which answers about groups of rows with
  `GroupGradients`.

The page "Write your own method" has an example of each.
"""

from keras_stab.gradients.groups import GroupGradients
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.optimizers.gradient_method import GradientMethod

__all__ = ["GradientMethod", "GradientOracle", "GroupGradients"]


def __dir__():
    return __all__
