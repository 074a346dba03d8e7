# SPDX-License-Identifier: Apache-2.0
"""Our ops in other people's libraries. Each module needs the library that it is named after."""
