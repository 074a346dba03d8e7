# SPDX-License-Identifier: Apache-2.0
"""CogView: text to image as one autoregressive sequence of tokens."""
