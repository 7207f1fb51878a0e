"""Arrays of JAX that lie on several devices, by `keras.distribution`.

One program runs on all of them, and an array is that of all rows. How it is
cut is a hint for the compiler, which by itself gathers K gradients on every
device; and a part of the program may run on each device's own rows alone.
"""

import math

import keras

from keras_stab.backend.devices import BACKEND

if BACKEND == "jax":
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec


def mesh_and_axis():
    """The mesh of `keras.distribution` and its axis along which rows lie."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return None, None
    mesh = distribution.device_mesh.backend_mesh
    return mesh, distribution.batch_dim_name


def cuts_weights():
    """Whether variables are cut too, as `ModelParallel` may do."""
    mesh, _ = mesh_and_axis()
    return mesh is not None and len(mesh.shape) > 1


def laid_out(tensor, *axes):
    """The same array, cut along the axes where a name of the mesh is given."""
    mesh, _ = mesh_and_axis()
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(tensor, sharding)


def cut_by_rows(tensor):
    """The same array, each device with a block of its rows."""
    _, axis = mesh_and_axis()
    return laid_out(tensor, axis)


def whole_on_each_device(tensor):
    """The same array, whole on every device."""
    return laid_out(tensor, *(None,) * tensor.ndim)


def cut_along_weights(stacks, aligned):
    """Arrays `[K, *shape]` as `[K, p]`, of which each device holds a slice.

    There are zeros at the end where that does not come out even.

    Args:
        stacks: List of arrays.
        aligned: Whether each device has groups of its own: then this is an
            exchange of all with all.
    """
    mesh, axis = mesh_and_axis()
    slices = []
    for stack in stacks:
        flat = _flat(stack, mesh.shape[axis])
        if aligned:
            flat = laid_out(flat, axis, None)
        slices.append(laid_out(flat, None, axis))
    return slices


def gathered(combined, shapes):
    """Vectors `[p]` that are cut over the devices, whole and in shape."""
    _, axis = mesh_and_axis()
    answer = []
    for part, shape in zip(combined, shapes):
        part = whole_on_each_device(laid_out(part, axis))
        answer.append(jnp.reshape(part[: math.prod(shape)], shape))
    return answer


def on_each_device(function, split, shared):
    """Runs a function on every device, with the rows that lie there.

    Args:
        function: `function(index, split, shared)`: the number of the device,
            its part of the arrays and all of the shared ones. Returns a
            structure of arrays.
        split: Structure of arrays, cut along their first axis.
        shared: Structure of arrays.

    Returns:
        The results of all devices, joined along their first axis.
    """
    mesh, axis = mesh_and_axis()
    return _mapped(
        lambda index, split, shared: function(index[0], split, shared),
        (PartitionSpec(axis), PartitionSpec(axis), PartitionSpec()),
        PartitionSpec(axis),
    )(jnp.arange(mesh.shape[axis], dtype="int32"), split, shared)


def sum_into_slices(function, split, shared, dimension=0):
    """As `on_each_device`, for arrays that are to be added up.

    Args:
        function: `function(scatter, split, shared)`: `scatter(stack)` adds up
            arrays `[K, *shape]` over the devices and returns the sum as
            `[K, p]`, of which each device forms and holds a slice. Returns a
            list of such slices, and other results.
        split, shared: As in `on_each_device`.
        dimension: The axis along which the arrays are split.

    Returns:
        The slices as arrays `[K, p]`, cut along the weights; and the other
        results, joined along their first axis.
    """
    mesh, axis = mesh_and_axis()

    def scatter(stack):
        flat = _flat(stack, mesh.shape[axis])
        if not flat.size:  # of a variable without elements
            return flat
        return jax.lax.psum_scatter(flat, axis, scatter_dimension=1, tiled=True)

    cut = PartitionSpec(*(None,) * dimension, axis)
    return _mapped(
        lambda split, shared: function(scatter, split, shared),
        (cut, PartitionSpec()),
        (PartitionSpec(None, axis), PartitionSpec(axis)),
    )(split, shared)


def with_those_of_all(function, tensors, dimension, adds):
    """Runs `function(own, all)` on each device's part of some arrays.

    Args:
        function: From the parts and the whole arrays to a matrix.
        tensors: List of arrays.
        dimension: Their axis along which they are cut.
        adds: Whether the matrices add up; otherwise they are rows of one.
    """
    _, axis = mesh_and_axis()

    def own_part(*own):
        everything = [
            jax.lax.all_gather(t, axis, axis=dimension, tiled=True) for t in own
        ]
        matrix = function(own, everything)
        return jax.lax.psum(matrix, axis) if adds else matrix

    cut = PartitionSpec(*(None,) * dimension, axis)
    result = PartitionSpec() if adds else PartitionSpec(axis)
    return _mapped(own_part, (cut,) * len(tensors), result)(*tensors)


def _mapped(function, inputs, outputs):
    mesh, _ = mesh_and_axis()
    # Differentiation happens inside of it, never through it: nothing has to
    # be known of what is equal on all devices.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=inputs,
        out_specs=outputs,
        check_vma=False,
    )


def _flat(stack, shares):
    """`[K, *shape]` as `[K, p]`, p a multiple of the number of devices."""
    flat = jnp.reshape(stack, (stack.shape[0], -1))
    return jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % shares)))
