"""Stable training for Keras 3, on TensorFlow, JAX and PyTorch."""

from keras_stab import constraints
from keras_stab._version import __version__
from keras_stab.averaged_weights import averaged_weights
from keras_stab.averaged_weights import export_averaged
from keras_stab.batch_norm import reestimate_batch_norm
from keras_stab.callbacks import StartBoostAtLoss
from keras_stab.diagnostics.comparison import compare_scores
from keras_stab.diagnostics.landscape import loss_landscape
from keras_stab.diagnostics.landscape import plot_loss_landscape
from keras_stab.diagnostics.monitor import StabilityMonitor
from keras_stab.diagnostics.power import seeds_needed
from keras_stab.diagnostics.report import stability_report
from keras_stab.diagnostics.sharpness import sharpness
from keras_stab.games import Game
from keras_stab.games import Player
from keras_stab.gradients.layer_rules import register_layer_rule
from keras_stab.gradients.small_problems import min_norm_weights
from keras_stab.gradients.train_step import TrainStep
from keras_stab.gradients.train_step import install
from keras_stab.gradients.train_step import uninstall
from keras_stab.optimizers.averaged_sgd import AveragedSGD
from keras_stab.optimizers.cegplus import CEGPlus
from keras_stab.optimizers.extragradient import ExtraGradient
from keras_stab.optimizers.grain import GRAIN
from keras_stab.optimizers.ire import IRE
from keras_stab.optimizers.lamb import LAMB
from keras_stab.optimizers.lars import LARS
from keras_stab.optimizers.lookahead import Lookahead
from keras_stab.optimizers.optimistic_gradient import OptimisticGradient
from keras_stab.optimizers.past_extragradient import PastExtraGradient
from keras_stab.optimizers.rapp import RAPP
from keras_stab.optimizers.sam import SAM
from keras_stab.optimizers.schedule_free import ScheduleFree
from keras_stab.optimizers.tvlars import TVLARS
from keras_stab.optimizers.weight_averaging import WeightAveraging
from keras_stab.schedules import TimeVaryingSigmoid
from keras_stab.schedules import WarmupCosine
from keras_stab.schedules import WarmupPolynomial
from keras_stab.swap_callbacks import AveragedWeights
from keras_stab.swap_callbacks import SwapSlowWeights
from keras_stab.tail_schedules import ConstantTail

install()
