"""What is found out about a batch in a step, and what the step makes of it."""

from typing import Any

import keras

from keras_stab.backend import devices
from keras_stab.gradients.batch_loss import BatchLoss
from keras_stab.gradients.pooling import StatePool
from keras_stab.nesting import adds_up
from keras_stab.nesting import scales_loss


class Answers(BatchLoss):
    """The loss of a batch, with the answers to what was asked about it.

    The base of `GradientOracle`, which has the questions.
    """

    def __init__(self, model: keras.Model, batch: tuple[Any, Any, Any]):
        super().__init__(model, batch)
        self.nonfinite = "propagate" if scales_loss(model.optimizer) else "drop"
        self.notes: dict[Any, Any] = {}
        # The method whose answer goes to the optimizer as it is.
        self.asked_by: Any = None
        self._root: Any = self
        self._current: Any = self
        self._replays = True
        self._keeps = False
        self._pull: Any = None
        self._outcome: Any = None
        self._random_state = None
        self._answers: dict[Any, Any] = {}

    # ---- For the train step -----------------------------------------------

    @property
    def outcome(self) -> Any:
        """The first evaluation of the whole batch at the current weights."""
        current = self._root._current
        if current._outcome is None:
            current.gradient()
        return current._outcome

    def wants_whole(self, method: Any) -> bool:
        """Whether each replica must get all of a method's answer."""
        return self.asked_by is not method or not adds_up(self.model.optimizer)

    def to_optimizer(self, gradients: list[Any]) -> list[Any]:
        """As `optimizer.apply` wants them: scaled, one share per replica.

        Variables that are not weights get their new value in its place.
        """
        factor = 1.0 / devices.replicas()
        if self.loss_scale is not None:
            factor = factor * self.loss_scale
        if self.loss_scale is not None or factor != 1.0:
            gradients = self.times(gradients, factor)
        return [
            gradient if new is None else new
            for gradient, new in zip(gradients, self.outcome.replacements)
        ]

    # ---- For the engines --------------------------------------------------

    def record(self, evaluation: Any) -> None:
        """Keeps the first evaluation of the whole batch of this oracle."""
        if self._outcome is None:
            self._outcome = evaluation

    def state_pool(self) -> StatePool:
        """The `StatePool` of the model, made once per step."""
        root = self._root
        if "pool" not in root._answers:
            root._answers["pool"] = StatePool(self.model)
        return root._answers["pool"]

    def _evaluate(self):
        return self.evaluate(self.batch, self.non_trainable, self.carried)

    def _evaluate_and_keep(self):
        evaluation, gradients, self._output_masks, self._pull = (
            self.evaluate_with_pullback()
        )
        return evaluation, gradients

    def _is_first(self):
        return self._root._current is self and self._outcome is None

    def _in_turn(self, question):
        root = self._root
        if root._random_state is None:
            root._random_state = devices.random_state()
        if self._is_first() or not self._replays:
            return question()
        with devices.replayed(root._random_state):
            return question()

    def _derived(self):
        oracle = object.__new__(type(self))
        oracle.__dict__.update(self.__dict__)
        oracle.carried_variables = list(self.model.metrics_variables)
        oracle.carried = self.carried[: len(oracle.carried_variables)]
        oracle._outcome = None
        oracle._pull = None
        oracle._answers = {}
        return oracle
