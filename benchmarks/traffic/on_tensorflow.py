"""TensorFlow: reads the graph of a step under `MirroredStrategy`."""

import tensorflow as tf

from traffic import cases

# Before TensorFlow makes its devices.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * cases.DEVICES,
)
# One for all: a second one fails in TensorFlow's collectives.
STRATEGY = tf.distribute.MirroredStrategy(
    [f"CPU:{i}" for i in range(cases.DEVICES)]
)
KINDS = {
    "CollectiveReduceV2": "all-reduce",
    "CollectiveGatherV2": "all-gather",
    "CollectiveReduceScatterV2": "reduce-scatter",
    "CollectiveAllToAllV2": "all-to-all",
}


def measure(model, arm):
    """Bytes of one step of one model, on the first device."""
    with STRATEGY.scope():
        network = cases.make_model(model, arm)
    data = tf.data.Dataset.from_tensor_slices(cases.make_data(model))
    data = data.batch(cases.ROWS, drop_remainder=True)
    network.fit(data, verbose=0, shuffle=False)

    @tf.function
    def step(data):
        return STRATEGY.run(network.train_step, args=(data,))

    batch = next(iter(STRATEGY.experimental_distribute_dataset(data)))
    graph = step.get_concrete_function(batch).graph
    return cases.summary(cases.number_of_weights(network), messages(graph))


def messages(graph):
    """What the first device is given by others."""
    operations = graph.get_operations()
    first = sorted({o.device for o in operations if o.type in KINDS})[0]
    found = []
    copied = set()
    for operation in operations:
        if operation.device != first:
            continue
        if operation.type in KINDS:
            size = sum(map(_bytes, operation.outputs))
            found.append((KINDS[operation.type], 1, size))
        for tensor in operation.inputs:
            # One without a device is placed where it is used.
            apart = tensor.op.device not in ("", first)
            if apart and tensor.dtype != tf.resource:
                copied.add(tensor.ref())
    found += [("copy", 1, _bytes(ref.deref())) for ref in copied]
    return [message for message in found if message[2]]


def _bytes(tensor):
    # Only numbers of the batch have no known shape: its size, the loss.
    if not tensor.shape.is_fully_defined():
        return 0
    return tensor.shape.num_elements() * tensor.dtype.size
