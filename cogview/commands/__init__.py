# SPDX-License-Identifier: Apache-2.0
"""What the verbs of ``cogview`` do: each is a function in ``verbs``; a long one has a file of its name."""
