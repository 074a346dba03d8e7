# SPDX-License-Identifier: Apache-2.0
import pytest

import cogview.data.digits


@pytest.fixture(scope="module")
def one_copy_of_each_digit():
    """Training on an eighth of the digits data: each scan without its altered copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cogview.data.digits, "TRAINING_COPIES", 1)
        yield
