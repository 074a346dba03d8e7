# SPDX-License-Identifier: Apache-2.0
"""What the norms share: PB-Relax in plain PyTorch, arguments of kernels, a row in a Triton program."""
