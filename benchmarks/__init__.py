# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every op against what a user would otherwise run. See benchmarks/README.md."""
