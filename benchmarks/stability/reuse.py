"""Compiles a model once for each arm and rewinds it for each run."""

import re

import keras


class CompiledModels:
    """One compiled model for each arm of a task.

    A run at another rate or with another seed differs in the values of
    variables alone. So the compiled model gets those of a new model and of a
    new optimizer, which are cheap to make: what was trained before leaves no
    trace, and a test compares with a new process.

    Args:
        task: The `Task`.
    """

    def __init__(self, task):
        self.task = task
        self._models = {}

    def rewound(self, optimizer):
        """A compiled model at the start of a run.

        Args:
            optimizer: New; its name says which compiled model it fits.
        """
        fresh = self.task.make_model()
        # A game wraps the optimizer that it is compiled with.
        self.task.compile(fresh, optimizer)
        fresh.optimizer.build(fresh.trainable_variables)
        model = self._models.setdefault(optimizer.name, fresh)
        if model is not fresh:
            copy_values(fresh.variables, model.variables)
            copy_values(fresh.optimizer.variables, model.optimizer.variables)
        return model


def copy_values(sources, targets):
    """Gives variables the values of others, in order."""
    for source, target in zip(sources, targets, strict=True):
        if kind(source) != kind(target):
            raise ValueError(
                f"{source.path} and {target.path} do not belong together: the "
                "arm makes optimizers of different variables."
            )
        target.assign(keras.ops.convert_to_numpy(source))


def kind(variable):
    """The name of a variable without the numbers of its model's layers."""
    return re.sub(r"_\d+", "", variable.path.split("/")[-1])
