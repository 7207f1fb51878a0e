"""Clipping of gradients at thresholds that follow the training."""

from keras_stab.optimizers.clipping.adaptive_clipping import AdaptiveClipping

__all__ = ["AdaptiveClipping"]
