# SPDX-License-Identifier: Apache-2.0
"""Seeds for the many uses of randomness in a run, all from the one seed of the run."""

from __future__ import annotations

import hashlib
import operator


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one use of randomness, so that no two uses of a run's seed coincide."""
    digest = hashlib.blake2b(repr((operator.index(seed), *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
