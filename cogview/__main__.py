# SPDX-License-Identifier: Apache-2.0
"""``python -m cogview``."""

import sys

from cogview.cli import main

sys.exit(main())
