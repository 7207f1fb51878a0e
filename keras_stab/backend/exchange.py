"""The exchange of group gradients between devices that share a batch.

K gradients of P weights are never whole on every device. Each device brings
what its own rows give of them; one exchange leaves it a slice along the
weights of all K. The inner products of slices, K x K numbers, are added up over
the devices; the combination is formed slice by slice, and one gather makes it
whole. That is the traffic of one all-reduce where every group lies whole on a
device ("aligned"), and (K + 1) / 2 times that where its rows are spread.
"""

import dataclasses

import keras

from keras_stab.backend import devices
from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.backend import replica_groups
from keras_stab.backend import sharding
from keras_stab.backend.devices import BACKEND


def batch_shares():
    """How many devices share the rows of a batch.

    On JAX by `keras.distribution`: every device computes in one program,
    whose arrays are those of all rows. Elsewhere a replica sees its own rows.
    """
    if BACKEND == "jax":
        mesh, axis = sharding.mesh_and_axis()
        return 1 if mesh is None else mesh.shape[axis]
    return devices.replicas() * devices.ranks()


def computes_on_each_device():
    """Whether a part of a step may run on each device's rows alone.

    Where the program is one for all devices: with weights on each of them.
    """
    return (
        BACKEND == "jax"
        and batch_shares() > 1
        and not (sharding.cuts_weights())
    )


def sees_own_rows():
    """Whether a step sees the rows of its own device alone, of several."""
    return BACKEND != "jax" and batch_shares() > 1


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device sends in a step to exchange group gradients.

    By ring algorithms; an all-reduce of the mean gradient sends twice
    `(D - 1) / D` times its bytes.

    Attributes:
        devices: D, how many share the rows of a batch.
        form: How it is done, in words.
        bytes: Sent by each device.
        plain_bytes: The same of a step with the mean gradient.
    """

    devices: int
    form: str
    bytes: int
    plain_bytes: int

    def __str__(self):
        if self.devices == 1:
            return "one device: nothing is exchanged"
        return (
            f"{self.devices} devices: {self.form}; each sends "
            f"{self.bytes / 2**20:.2f} MiB, for a mean gradient "
            f"{self.plain_bytes / 2**20:.2f} MiB"
        )


def traffic(weights, groups, aligned, sent=None):
    """The `Traffic` of K gradients in float32.

    Args:
        weights: P, how many numbers a gradient has.
        groups: K, over all devices.
        aligned: As for `cut`.
        sent: How many numbers each device sends, up to `(D - 1) / D`, where
            that is known otherwise.
    """
    shares = batch_shares()
    part = 4 * (shares - 1)
    once = weights * part // shares
    each = groups // shares if aligned else groups
    form = "groups whole on a device" if aligned else "groups over all devices"
    how = "gradients cut along the weights"
    if sent is not None:
        how = "gradients cut, rows gathered or sums formed, layer by layer"
    # Of tf.distribute the combination is an all-reduce: see `replica_groups`.
    gathered = 2 if BACKEND == "tensorflow" else 1
    return Traffic(
        shares,
        f"{form}, {how}",
        once * (each + gathered) if sent is None else sent * part // shares,
        once * 2,
    )


@dataclasses.dataclass
class GroupSlices:
    """K gradients in their packed form, of which a device holds slices.

    Attributes:
        slices: List of tensors `[K, ...]`.
        sizes: Rows in each group, over all devices.
        shapes: What a combination of each of `slices` comes back as, where it
            must be made whole; `None` where the slices are whole already.
    """

    slices: list
    sizes: list
    shapes: list | None = None

    def divided_by(self, scale):
        """The same, divided by a scalar: that of a loss scaler."""
        slices = [s / keras.ops.cast(scale, s.dtype) for s in self.slices]
        return dataclasses.replace(self, slices=slices)

    def evaluated(self):
        """Of how many groups there is a gradient; the others are empty."""
        return self.slices[0].shape[0] if self.slices else len(self.sizes)

    def gram(self):
        """Inner products of the gradients, of all weights together."""
        total = products.total(
            [products.inner_products(part) for part in self.slices]
        )
        return alike(total)

    def stacks(self):
        """The gradients themselves, in their packed form, on every device."""
        if self.shapes is None:
            return self.slices
        each = [whole(parts, self.shapes) for parts in zip(*self.slices)]
        return [keras.ops.stack(column) for column in zip(*each)]

    def combine(self, weights, on_all=True):
        """Combinations of the gradients, one for each of `slices`.

        Args:
            weights: Tensor with a number for each group.
            on_all: As in `ReplicaGroups.combine`; here it is always so.
        """
        combined = [group_weights.combine(weights, s) for s in self.slices]
        return whole(combined, self.shapes)


def cut(stacks, sizes, aligned=False):
    """Cuts K gradients along the weights over the devices: `GroupSlices`.

    Args:
        stacks: List of tensors in full precision, as `products.pack_groups`
            makes them. On JAX `[K, *shape]`, of all rows. Where a replica
            sees its own rows: of its own groups, `[m, ...]`, where aligned;
            else `[K, ...]`, the mean gradients of its rows of all groups
            (fewer than K, where its last groups are empty).
        sizes: Rows in each of these groups, m or K of them.
        aligned: Whether every group lies whole on a device.
    """
    if batch_shares() == 1 or devices.ranks() > 1:
        # Processes exchange what all engines answer, see `processes`.
        return GroupSlices(stacks, sizes)
    if BACKEND == "jax":
        if sharding.cuts_weights():  # which it would undo
            return GroupSlices(stacks, sizes)
        shapes = [tuple(stack.shape[1:]) for stack in stacks]
        aligned = aligned and len(sizes) % batch_shares() == 0
        slices = sharding.cut_along_weights(stacks, aligned)
        return GroupSlices(slices, sizes, shapes)
    return replica_groups.ReplicaGroups(stacks, sizes, aligned)


def with_shared_rows(tensor):
    """The same tensor, its rows dealt out to the devices where they can be."""
    if BACKEND != "jax" or batch_shares() == 1:
        return tensor
    if tensor.shape[0] % batch_shares():
        return tensor
    return sharding.cut_by_rows(tensor)


def alike(small):
    """A small tensor, with which every device is to compute the same.

    On JAX, where it is that of all devices already, the compiler would cut the
    K x K problem too.
    """
    if BACKEND == "jax" and batch_shares() > 1:
        return sharding.whole_on_each_device(small)
    return small


def whole(combined, shapes):
    """Makes combinations of slices whole, on every device.

    Args:
        combined: List of tensors, one for each of `GroupSlices.slices`.
        shapes: `GroupSlices.shapes`.
    """
    return combined if shapes is None else sharding.gathered(combined, shapes)
