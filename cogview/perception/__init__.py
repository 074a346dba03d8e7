# SPDX-License-Identifier: Apache-2.0
"""Frozen networks that were trained elsewhere: what they see in pictures, and what they read in texts."""
