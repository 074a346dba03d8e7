# SPDX-License-Identifier: Apache-2.0
"""The page of ``cogview serve``: what is asked, the queue, the thread that draws, and the tabs on top."""
