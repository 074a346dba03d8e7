# SPDX-License-Identifier: Apache-2.0
"""The table of ``tests/mutations.py`` follows the sources: what it would break stands in one file."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation, find


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_stands_in_one_file(mutation: Mutation):
    assert find(mutation, ROOT) is not None
    assert mutation.before != mutation.after


def test_names_are_not_repeated():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
