"""Train steps that the backend's compiler cannot follow run uncompiled."""

import contextlib
import warnings

from keras_stab.backend import devices
from keras_stab.gradients.train_step import takes_step
from keras_stab.gradients.train_step import takes_step_of
from keras_stab.nesting import nest


@contextlib.contextmanager
def uncompiled_if_need_be(model, force=False):
    """Sets `jit_compile` aside while the train function is made, if need be.

    Where every step is Python, a compiler of functions breaks off at each
    gradient that a method takes and at each number that it reads: the pieces
    take longer than the eager step, lose gradients or do not compile at all.
    """
    optimizer = getattr(model, "optimizer", None)
    made_already = model.train_function is not None and not force
    if (
        not devices.EAGER
        or not takes_step_of(model)
        or made_already
        or not model.jit_compile
    ):
        yield
        return
    methods = (
        type(each).__name__ for each in nest(optimizer) if takes_step(each)
    )
    name = next(methods, "RecoverFromSpikes")
    warnings.warn(
        f"The train step of {name} takes gradients by itself, which the "
        f"compiler of {devices.backend_name()} cannot follow: it runs "
        "uncompiled, as with jit_compile=False. `evaluate` and `predict` are "
        "compiled",
        stacklevel=6,
    )
    model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = True
