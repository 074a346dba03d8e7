# SPDX-License-Identifier: Apache-2.0
"""Kernels for CogView: three-region attention, Sandwich-LayerNorm, stable softmax, linear cross-entropy."""
