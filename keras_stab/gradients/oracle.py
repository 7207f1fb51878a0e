"""GradientOracle: answers a method's questions about the current batch."""

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_fraction
from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.batch_loss import BatchLoss
from keras_stab.gradients.engines import group_gradients
from keras_stab.gradients.pooling import StatePool
from keras_stab.gradients.pooling import shift_seeds
from keras_stab.nesting import adds_up
from keras_stab.nesting import scales_loss

# Seeds of other noise: beyond those of every group.
NEW_NOISE = 64


class GradientOracle(BatchLoss):
    """Gradients of one batch: of all of it, of groups, elsewhere.

    A method receives an oracle in `estimate(oracle)` and may ask any number
    of questions; nothing is assigned while it does. Gradients are those of
    the unscaled loss of the global batch, over all replicas, in the order of
    `model.trainable_variables`; one is `None` where the loss does not depend
    on a variable, and where a variable is not a weight (its
    `overwrite_with_gradient` is set, as of the scales of float8 layers).

    Every question sees the same stored state: the same dropout masks, the
    same moving statistics. What the trainer keeps (metrics, batch-norm
    statistics, scales of float8 layers, seeds) comes from the first
    evaluation of the whole batch at the current weights.
    """

    def __init__(self, model, x, y=None, sample_weight=None):
        super().__init__(model, (x, y, sample_weight))
        self.nonfinite = "propagate" if scales_loss(model.optimizer) else "drop"
        self.notes = {}
        # The method whose answer goes to the optimizer as it is.
        self.asked_by = None
        self._root = self
        self._current = self
        self._replays = True
        self._keeps = False
        self._pull = None
        self._outcome = None
        self._random_state = None
        self._answers = {}

    # ---- Questions --------------------------------------------------------

    def gradient(self):
        """The gradient of the batch loss, one tensor per variable."""
        if "gradient" not in self._answers:
            keeps = self._keeps and self._is_first()
            evaluation, gradients = self._in_turn(
                self._evaluate_and_keep if keeps else self._evaluate
            )
            self.record(evaluation)
            if devices.replicas() > 1:
                gradients = [tracing.densify(g) for g in gradients]
            self._answers["gradient"] = self.unscaled(
                devices.sum_over_replicas(gradients)
            )
        return self._answers["gradient"]

    def keep_forward(self):
        """Makes `gradient_of_outputs` possible, at the price of memory.

        The forward pass of the first `gradient()` is kept until the step
        ends; other questions keep none.
        """
        self._keeps = True

    @property
    def has_forward(self):
        """Whether there is a forward pass for `gradient_of_outputs`."""
        return self._pull is not None

    def gradient_of_outputs(self, loss):
        """The gradient of another loss, from the forward pass that was kept.

        Args:
            loss: As in `with_loss`.
        """
        _, y, sample_weight = self.batch
        leaves = keras.tree.flatten(self._outcome.y_pred)

        def scaled_loss(leaves):
            for leaf, mask in zip(leaves, self._output_masks):
                keras_internals.set_mask(leaf, mask)
            y_pred = keras.tree.pack_sequence_as(self._outcome.y_pred, leaves)
            return self.scaled(loss(y, y_pred, sample_weight)), None

        _, cotangents = differentiation.value_and_gradients(scaled_loss, leaves)
        cotangents = [
            keras.ops.zeros_like(leaf) if c is None else c
            for leaf, c in zip(leaves, cotangents)
        ]
        return self.unscaled(self._pull(cotangents))

    @property
    def loss(self):
        """The loss here, once a gradient was asked for."""
        return self._outcome.loss

    def group_gradients(self, groups, engine="auto", rule="interleaved"):
        """The gradients of K groups of rows, as a `GroupGradients`.

        Args:
            groups: Int, K.
            engine: One of `ENGINES`.
            rule: Which rows are in which group, as in `grouping_for`.
        """
        key = groups, engine, rule
        if key not in self._answers:
            self._answers[key] = self._in_turn(lambda: self._groups(*key))
        return self._answers[key]

    def at(self, shift, factor=None):
        """The same oracle at the weights + `factor * shift`.

        Args:
            shift: List of tensors, one per trainable variable; `None` for a
                variable that stays where it is.
            factor: Scalar tensor or float; `None` for 1.
        """
        oracle = self._derived()
        oracle.values = many_tensors.shifted(self.values, shift, factor)
        return oracle

    def moved_to(self, values):
        """The same oracle at other weights, as the current weights.

        For a method whose weights in the model are not those that it trains
        at. What the trainer keeps then comes from an evaluation there.
        """
        oracle = self._derived()
        oracle.values = values
        if self._root._current is self:
            oracle.carried_variables = self.carried_variables
            oracle.carried = self.carried
            self._root._current = oracle
        return oracle

    def with_labels(self, sampler):
        """The same oracle with other labels.

        Args:
            sampler: Function `(y, y_pred) -> y`, called inside the forward
                pass; `y_pred` is a constant to the gradient.
        """
        oracle = self._derived()
        oracle._sampler = sampler
        return oracle

    def with_loss(self, loss):
        """The same oracle with another loss; it has no group gradients.

        Args:
            loss: Function `(y, y_pred, sample_weight) -> scalar`, called
                inside the forward pass.
        """
        oracle = self._derived()
        oracle._loss = loss
        return oracle

    def with_compiled_loss(self):
        """The same oracle without regularisers and other penalties.

        A model's own `compute_loss` stays what it is.
        """
        if type(self.model).compute_loss is not keras.Model.compute_loss:
            return self._derived()

        def loss(y, y_pred, sample_weight):
            return keras_internals.compiled_loss(
                self.model, y, y_pred, sample_weight
            )

        return self.with_loss(loss)

    def gradient_beside(self):
        """As `gradient`, for use in a condition: a new answer is not kept."""
        if "gradient" in self._answers:
            return self._answers["gradient"]
        return self._derived().gradient()

    def with_new_noise(self):
        """The same oracle with other dropout masks."""
        oracle = self._derived()
        oracle.non_trainable = shift_seeds(
            self.non_trainable_variables, self.non_trainable, NEW_NOISE
        )
        oracle._replays = False
        return oracle

    def head(self, fraction):
        """The same oracle on a part of the batch, rounded up.

        Its rows lie evenly spread over the batch, so that the work stays
        balanced when the batch is cut over devices.
        """
        size = rows.batch_size(*self.batch)
        count = rows.part_of(size, checked_fraction("fraction", fraction))
        oracle = self._derived()
        oracle.batch = rows.spread(self.batch, count, size)
        return oracle

    # ---- For the train step -----------------------------------------------

    @property
    def outcome(self):
        """The first evaluation of the whole batch at the current weights."""
        current = self._root._current
        if current._outcome is None:
            current.gradient()
        return current._outcome

    def wants_whole(self, method):
        """Whether each replica must get all of a method's answer."""
        return self.asked_by is not method or not adds_up(self.model.optimizer)

    def to_optimizer(self, gradients):
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

    def record(self, evaluation):
        """Keeps the first evaluation of the whole batch of this oracle."""
        if self._outcome is None:
            self._outcome = evaluation

    def state_pool(self):
        """The `StatePool` of the model, made once per step."""
        root = self._root
        if "pool" not in root._answers:
            root._answers["pool"] = StatePool(self.model)
        return root._answers["pool"]

    def _groups(self, *arguments):
        return group_gradients(self, *arguments)

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
