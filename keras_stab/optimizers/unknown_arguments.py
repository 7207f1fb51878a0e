"""What to write instead of an argument that a wrapper does not have."""

import difflib
import inspect

import keras


def refuse_unknown_arguments(wrapper, inner, arguments):
    """Raises a `ValueError` that says what to write instead.

    Args:
        wrapper: The class that was called.
        inner: The optimizer inside it.
        arguments: Dict of what its constructor does not name.
    """
    argument, value = next(iter(arguments.items()))
    own = set(inspect.signature(wrapper).parameters)
    own = sorted(own - {"inner_optimizer", "kwargs"})
    kind = _that_takes(argument, type(inner))
    if kind is not None:
        advice = (
            ": arguments of the optimizer belong on the inner one, for example "
            f"{wrapper.__name__}(keras.optimizers.{kind}({argument}={value!r}))"
        )
    elif near := difflib.get_close_matches(argument, own, n=1, cutoff=0.5):
        advice = f": did you mean `{near[0]}`"
    else:
        advice = f": it has {', '.join(f'`{name}`' for name in own)}"
    raise ValueError(
        f"{wrapper.__name__} takes no argument `{argument}`{advice}. "
        f"Received: {', '.join(arguments)}"
    )


def _that_takes(argument, first):
    """The name of an optimizer of Keras that has the argument, or `None`."""
    kinds = keras.optimizers
    for kind in (first, kinds.AdamW, kinds.SGD, *vars(kinds).values()):
        known = isinstance(kind, type) and issubclass(kind, kinds.Optimizer)
        if not known or argument not in _names_of(kind):
            continue
        # PyTorch's forms of Keras's optimizers are subclasses of those.
        for each in kind.__mro__:
            if vars(kinds).get(each.__name__) is each:
                return each.__name__
    return None


def _names_of(kind):
    """Arguments of a class; those of its bases where it passes them on."""
    names = set()
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(each.__init__).parameters
        names.update(parameters)
        if "kwargs" not in parameters:
            break
    return names
