"""What was found out about a model, kept for as long as the model lives."""

_NAME = "_keras_stab_memory"


class _Topics:
    """A dictionary for each topic. Saving a model looks into no such object."""

    def __init__(self):
        self.known = {}


def remembered(model, topic):
    """A dictionary about the model for one topic, empty at first.

    It stands on the model itself and goes with it. In a `WeakKeyDictionary` an
    entry that leads back to its key, by a layer or a loss that knows the model,
    would keep the model and its weights for ever.
    """
    # By `vars`: Keras tracks what is set as an attribute.
    topics = vars(model).setdefault(_NAME, _Topics())
    return topics.known.setdefault(topic, {})
