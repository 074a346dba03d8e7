# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: our attention in any of its models, our norms and loss in some of them.

::

    from cogview_kernels.integrations.transformers import patch, register

    register(block_size=64, window_blocks=4, num_pivots=256)
    model = AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="three_region")

    patch(model, sandwich_norm=True, linear_cross_entropy=True)  # Gemma 2 and 3, GLM-4, GLM-Image, OLMo 2

Needs transformers 5: ``pip install 'cogview-kernels[transformers]'``.
"""

try:
    import transformers as _transformers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "cogview_kernels.integrations.transformers needs transformers, which is not installed: "
        "pip install 'cogview-kernels[transformers]'",
        name=error.name,
    ) from None
if int(_transformers.__version__.split(".")[0]) != 5:
    raise ImportError(
        f"cogview_kernels.integrations.transformers needs transformers 5, got {_transformers.__version__}: "
        "pip install 'cogview-kernels[transformers]'"
    )

from cogview_kernels.integrations.transformers.attention import register
from cogview_kernels.integrations.transformers.patch import patch, unpatch

__all__ = ["patch", "register", "unpatch"]
