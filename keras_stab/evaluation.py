"""A model's averaged weights: look at them, evaluate them, export them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_stab.batch_norm import reestimate_batch_norm
from keras_stab.batches import preprocesses
from keras_stab.optimizers.averaging.weight_averaging import WeightAveraging
from keras_stab.optimizers.lent_weights import lenders
from keras_stab.trainer.guards import take_back
from keras_stab.trainer.lending import lent_weights


@contextlib.contextmanager
def averaged_weights(
    model: keras.Model,
    data: Any = None,
    steps: int | None = None,
    verbose: int = 0,
) -> Iterator[keras.Model]:
    """Puts the average into the model, and the trained weights back.

    Inside the `with` block the model holds the average: evaluate, predict or
    save it. On leaving, even by an exception, weights and batch-norm
    statistics are back bit for bit. Training inside the block goes on from
    the trained weights, which then stay. What is saved inside (a `.keras` or
    weights file, or the state tree of an Orbax checkpoint) holds the average
    in the model and the trained weights in the optimizer; they return when
    training resumes.

    Args:
        model: A `keras.Model` compiled with a `WeightAveraging`, also inside
            other optimizers.
        data: Training data, as for `reestimate_batch_norm`, to compute the
            batch-norm statistics of the average; `None` leaves them as they
            are. Defaults to `None`.
        steps: Int, the most batches of `data` to use. Defaults to `None`.
        verbose: 1 for a progress bar over `data`. Defaults to 0.

    Yields:
        The model.

    Raises:
        ValueError: If the optimizer keeps no average, or has none yet.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(keras_stab.WeightAveraging("sgd"), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, epochs=3, verbose=0)
    >>> with keras_stab.averaged_weights(model):
    ...     loss = model.evaluate(x, y, verbose=0)
    """
    methods = averaging_methods(model)
    lent = [m for m in methods if m.swapped and not m.lent_by_fit]
    if data is not None and lent:
        raise ValueError(
            "The model holds the average already, with the batch-norm "
            "statistics that came with it. Pass `data` to the outer "
            "`averaged_weights` or callback. Received: "
            f"data of type {type(data).__name__}"
        )

    def refresh():
        reestimate_batch_norm(model, data, steps=steps, verbose=verbose)

    with lent_weights(model, methods, None if data is None else refresh):
        yield model


def return_trained_weights(model: keras.Model) -> None:
    """Puts the trained weights back into a model that holds others.

    `fit` leaves the evaluation weights of its optimizer in the model: the
    average, slow weights or an anchor. `fit` and `train_on_batch` put the
    trained weights back by themselves when they go on; a training loop of
    your own calls this first. Nothing happens where the model holds the
    trained weights.

    Args:
        model: A compiled `keras.Model`.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(keras_stab.WeightAveraging("sgd"), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, epochs=3, verbose=0)
    >>> loss = model.evaluate(x, y, verbose=0)  # of the average
    >>> keras_stab.return_trained_weights(model)
    >>> loss = model.evaluate(x, y, verbose=0)  # of the trained weights
    """
    take_back(model)


def export_averaged(
    model: keras.Model,
    data: Any = None,
    steps: int | None = None,
    verbose: int = 0,
) -> keras.Model:
    """A plain model that holds the average; it is not compiled.

    Args:
        model, data, steps, verbose: As for `averaged_weights`. The model
            must be one that `keras.models.clone_model` can clone.

    Returns:
        A `keras.Model` without optimizer, which shares the preprocessor of a
        KerasHub task; `model` stays as it is.

    Raises:
        ValueError: If there is no average, or the model cannot be cloned.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(keras_stab.AveragedSGD(0.1), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, verbose=0)
    >>> plain = keras_stab.export_averaged(model)
    >>> plain.compiled
    False
    """
    with averaged_weights(model, data, steps, verbose):
        clone = _clone(model)
        for own, variable in zip(clone.variables, model.variables):
            # A copy: on JAX no two variables may hold the same array.
            own.assign(keras.ops.copy(variable.value))
    return clone


def averaging_methods(model):
    """The methods in the model's optimizer that average.

    Raises:
        ValueError: If there are none.
    """
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(model, keras.Model) or optimizer is None:
        state = "a model that is not compiled, "
        raise ValueError(
            "A compiled keras.Model is needed, whose optimizer averages the "
            "weights: model.compile(WeightAveraging(optimizer), ...), and "
            "train it. A model that was loaded with `compile=False` has lost "
            "its average. Received: "
            f"{state if isinstance(model, keras.Model) else ''}{model!r}"
        )
    methods = lenders(optimizer, WeightAveraging)
    if not methods:
        raise ValueError(
            "The model's optimizer holds no WeightAveraging; compile with "
            "one, for example WeightAveraging(optimizer). Received: "
            f"optimizer {type(model.optimizer).__name__}"
        )
    return methods


def _clone_of_class(model):
    """Clones a KerasHub task: Keras clones only the functional model in it."""
    clone = type(model).from_config(model.get_config())
    # Its configuration may leave out the vocabulary.
    if hasattr(model, "preprocessor"):
        clone.preprocessor = model.preprocessor
    # Tasks compile themselves.
    clone.compiled, clone.optimizer = False, None
    return clone


def _clone(model):
    # Keras would compile the clone too, with a second optimizer.
    compiled, model.compiled = model.compiled, False
    try:
        clone = keras.models.clone_model(model)
        if preprocesses(model) and not preprocesses(clone):
            clone = _clone_of_class(model)
        if not clone.built:
            clone.build_from_config(model.get_build_config())
    except Exception as error:
        raise ValueError(
            "The model cannot be cloned; save it inside "
            "`with keras_stab.averaged_weights(model):` instead. Received: "
            f"a model of type {type(model).__name__}"
        ) from error
    finally:
        model.compiled = compiled
    shapes = [
        [tuple(v.shape) for v in part.variables] for part in (clone, model)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "A clone of the model has other variables (adapters that were "
            "added later, for example); save it inside `with "
            "keras_stab.averaged_weights(model):` instead. Received: "
            f"{len(shapes[1])} variables, the clone has {len(shapes[0])}"
        )
    return clone
