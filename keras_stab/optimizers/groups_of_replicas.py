"""Methods whose groups are those of the devices that share a batch."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.gradients.exchanged import ExchangedGradients
from keras_stab.gradients.exchanged import check_agreement
from keras_stab.nesting import scales_loss
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.group_arguments import check_saved_total
from keras_stab.optimizers.group_arguments import total_now


class GroupsOfReplicas(GradientMethod):
    """A method whose groups may be those of the devices that share a batch.

    Where processes do, each is a group in a loop of one's own too: when it has
    not been told what it estimated, the gradients given to `apply` are those
    of the rows of this process, and it combines them with those of the others.
    """

    across: str | None
    groups: int
    _total: int | None = None  # K, fixed when the state is made

    def _all_groups(self) -> int:
        """K, the groups on all devices."""
        return total_now(self._total, self.groups, self.across)

    def solve(
        self,
        gram: Any,
        present: Any,
        nonfinite: str,
        rows: Any = None,
        sizes: Any = None,
    ) -> Any:
        """Weights `(K,)` and the figures `GROUP_MEASURES` of a Gram matrix.

        Args:
            gram, present, nonfinite: As in `min_norm_weights`.
            rows: Scalar, rows in the batch; `None` where the optimizer does
                not see them.
            sizes: Those in each group, a list, or `None`.
        """
        raise NotImplementedError

    def load_own_variables(self, store: Any) -> None:
        if self.built and "0" in store.keys():
            (saved,) = store["0"].shape
            name = type(self).__name__
            check_saved_total(name, saved, self._total, self.across)
        super().load_own_variables(store)

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        gradients, variables = list(grads), trainable_variables
        local = (
            self.across == "replicas"
            and self.handed_over is None
            and devices.ranks() > 1
            and self.wants_oracle
            and len(gradients) > 0
        )
        if not local:
            super().apply(gradients, variables)
            return
        if variables is None:
            variables = keras_internals.built_variables(self)
        variables = list(variables)
        gradients, note = _combined(self, gradients, variables)
        # Past Keras, which would look through what is set for variables.
        self.__dict__["handed_over"] = note
        try:
            super().apply(gradients, variables)
        finally:
            self.__dict__["handed_over"] = None


def _combined(optimizer, gradients, variables):
    """The combination of the gradients of all processes, and a note on it."""
    if optimizer.groups > 1:
        raise ValueError(
            "A gradient of all rows of a process cannot be cut into groups. "
            "In a loop of your own use groups=1, which makes one group of "
            "each process; in `fit` each of them can have several. Received: "
            f"groups={optimizer.groups} for each process"
        )
    likes = [tracing.read(v) for v in variables]
    first = check_agreement(optimizer, likes, "plain", devices.ranks())
    stacks = [g if g is None else tracing.densify(g)[None] for g in gradients]
    groups = ExchangedGradients(likes, stacks, [1], aligned=True)
    gram = groups.gram()
    if first:
        _check_not_summed(gram)
    nonfinite = "propagate" if scales_loss(optimizer) else "drop"
    note = optimizer.solve(gram, groups.present, nonfinite)
    return groups.combine(note[0]), note


def _check_not_summed(gram):
    if gram[0, 0] > 0.0 and (gram == gram[0, 0]).all():
        raise ValueError(
            "All processes handed over the same gradient: it was averaged "
            "before, and there is nothing left to combine. Compute it inside "
            "of `with module.no_sync():` of DistributedDataParallel, or "
            "without that module, and give each process rows of its own. "
            f"Received: {len(gram)} gradients alike"
        )
