"""GradientOracle: answers a method's questions about the current batch."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_fraction
from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.answers import Answers
from keras_stab.gradients.by_loss import by_loss
from keras_stab.gradients.engines import group_gradients
from keras_stab.gradients.groups import GroupGradients
from keras_stab.gradients.pooling import shift_seeds
from keras_stab.types import Tensor

# Seeds of other noise: beyond those of every group.
NEW_NOISE = 64


class GradientOracle(Answers):
    """Gradients of one batch: of all of it, of groups, elsewhere.

    A method receives an oracle in `estimate(oracle)` and may ask any number
    of questions; nothing is assigned while it does. Gradients are those of
    the unscaled loss of the global batch, over all replicas, in the order of
    `model.trainable_variables`; one is `None` where the loss does not depend
    on a variable, and where a variable is not a weight (its
    `overwrite_with_gradient` is set, as of the scales of float8 layers).

    The questions are `gradient`, `group_gradients` and `loss_gradients`; `at`,
    `with_loss`, `with_compiled_loss`, `with_labels`, `with_new_noise` and
    `head` return another oracle, to be asked the same. With `loss`,
    `keep_forward`, `has_forward`, `gradient_of_outputs` and the attributes
    below they are what a method of yours can rely on; the rest serves the
    train step.

    Every question sees the same stored state: the same dropout masks, the
    same moving statistics. What the trainer keeps (metrics, batch-norm
    statistics, scales of float8 layers, seeds) comes from the first
    evaluation of the whole batch at the current weights.

    Attributes:
        model: The compiled `keras.Model`.
        batch: Tuple `(x, y, sample_weight)`.
        variables: `model.trainable_variables`.
        values: Their values, where gradients are taken.
        notes: Dict. What a method leaves under itself is its `handed_over`
            while its gradients are applied.
        nonfinite: `"propagate"` if a loss scaler has to see gradients that are
            not finite, else `"drop"`.
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
    ):
        super().__init__(model, (x, y, sample_weight))

    def gradient(self) -> list[Any]:
        """The gradient of the batch loss, one tensor per variable.

        It is computed once; a second question gets the same answer.
        """
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

    def keep_forward(self) -> None:
        """Makes `gradient_of_outputs` possible, at the price of memory.

        The forward pass of the first `gradient()` is kept until the step
        ends; other questions keep none.
        """
        self._keeps = True

    @property
    def has_forward(self) -> bool:
        """Whether there is a forward pass for `gradient_of_outputs`."""
        return self._pull is not None

    def gradient_of_outputs(self, loss: Callable[..., Any]) -> list[Any]:
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
    def loss(self) -> Tensor:
        """The loss here, once a gradient was asked for."""
        return self._outcome.loss

    def group_gradients(
        self, groups: int, engine: str = "auto", rule: str = "interleaved"
    ) -> GroupGradients:
        """The gradients of K groups of rows, as a `GroupGradients`.

        Args:
            groups: Int of at least 1, K.
            engine: How they are computed: `"auto"`, `"one_pass"` or
                `"microbatch"`, as in `GRAIN`. Defaults to `"auto"`.
            rule: Which rows are in which group: `"interleaved"` (row i in
                group i mod K), `"contiguous"`, or `"replicas"` (contiguous,
                each group whole on a device). Defaults to `"interleaved"`.
        """
        key = groups, engine, rule
        if key not in self._answers:
            self._answers[key] = self._in_turn(lambda: self._groups(*key))
        return self._answers[key]

    def loss_gradients(self) -> GroupGradients:
        r"""The gradients of the K losses of `compile`, as a `GroupGradients`.

        $g_k = \nabla (K w_k L_k + R)$ on all rows: the loss of an output with
        its weight, and all penalties. Their mean is `gradient()`.

        Raises:
            ValueError: If the model was compiled with one loss, or computes
                its loss itself.
        """
        if self._loss is not None:
            raise ValueError(
                "An oracle with another loss knows no single losses: ask the "
                "one that `estimate` was given"
            )
        if "losses" not in self._answers:
            self._answers["losses"] = self._in_turn(self._losses)
        return self._answers["losses"]

    def at(
        self, shift: Sequence[Any], factor: Tensor | float | None = None
    ) -> "GradientOracle":
        """The same oracle at the weights + `factor * shift`.

        Args:
            shift: List of tensors, one per trainable variable; `None` for a
                variable that stays where it is.
            factor: Scalar tensor or float; `None` for 1. Defaults to `None`.
        """
        oracle = self._derived()
        oracle.values = many_tensors.shifted(self.values, shift, factor)
        return oracle

    def moved_to(self, values: list[Any]) -> "GradientOracle":
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

    def with_labels(self, sampler: Callable[..., Any]) -> "GradientOracle":
        """The same oracle with other labels.

        Args:
            sampler: Function `(y, y_pred) -> y`, called inside the forward
                pass; `y_pred` is a constant to the gradient.
        """
        oracle = self._derived()
        oracle._sampler = sampler
        return oracle

    def with_loss(self, loss: Callable[..., Any]) -> "GradientOracle":
        """The same oracle with another loss; `gradient` is all it answers.

        Args:
            loss: Function `(y, y_pred, sample_weight) -> scalar`, called
                inside the forward pass.
        """
        oracle = self._derived()
        oracle._loss = loss
        return oracle

    def with_compiled_loss(self) -> "GradientOracle":
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

    def gradient_beside(self) -> list[Any]:
        """As `gradient`, for use in a condition: a new answer is not kept."""
        if "gradient" in self._answers:
            return self._answers["gradient"]
        return self._derived().gradient()

    def with_new_noise(self) -> "GradientOracle":
        """The same oracle with other dropout masks."""
        oracle = self._derived()
        oracle.non_trainable = shift_seeds(
            self.non_trainable_variables, self.non_trainable, NEW_NOISE
        )
        oracle._replays = False
        return oracle

    def head(self, fraction: float) -> "GradientOracle":
        """The same oracle on a part of the batch, rounded up.

        Its rows lie evenly spread over the batch, so that the work stays
        balanced when the batch is cut over devices.

        Args:
            fraction: Float in (0, 1], the part of the rows.
        """
        size = rows.batch_size(*self.batch)
        count = rows.part_of(size, checked_fraction("fraction", fraction))
        oracle = self._derived()
        oracle.batch = rows.spread(self.batch, count, size)
        return oracle

    def _groups(self, *arguments):
        return group_gradients(self, *arguments)

    def _losses(self):
        return by_loss(self)
