# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ops and of training against what a user would otherwise run. See benchmarks/README.md."""

# In order of importance: a run that is short of time leaves out the last ones.
OPS = (
    "three_region_attention",
    "sandwich_layer_norm",
    "sandwich_rms_norm",
    "linear_cross_entropy",
    "stable_softmax",
    "layer_norm",
    "rms_norm",
    "decode_attention",
    "local_attention_2d",
    "decode_linear",
)
# The first of the others has a kernel on the CPU alone.
BENCHMARKS = (*OPS, "decode_step", "training_step")
