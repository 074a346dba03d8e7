# SPDX-License-Identifier: Apache-2.0
"""The compiled extension, csrc/bindings.cpp. Functions ending in ``_cuda`` exist where has_cuda is True,
those ending in ``_sm90`` where nvcc compiled for compute capability 9.0.

Integers named after tensors are addresses, 0 for none. Dtypes are the codes of ``_extension.DTYPE_CODES``.
"""

from typing import TypeAlias

from torch import Tensor

_Address: TypeAlias = int
# A weight, a bias or its gradient; integers, contiguous; a tensor of attention, its rows contiguous.
_Parameter: TypeAlias = Tensor | None
_Integers: TypeAlias = Tensor | None
_Strided: TypeAlias = Tensor | None
# keep_threshold, keep_scale, seed, address of a seed on the device.
_Dropout: TypeAlias = tuple[int, float, int, _Address]
# Pivots [B, P], block_size, window_blocks, pivot_bias, causal, starts [B].
_Layout: TypeAlias = tuple[_Integers, int, int, float, bool, _Integers]
# Rows and columns of the grid of keys, radii of the window, query_scale, causal.
_Window: TypeAlias = tuple[int, int, int, int, int, bool]
# A tensor of the rows' shape and dtype. eps, the mode of PB-Relax. For CUDA: address, number of blocks.
_RowShape: TypeAlias = Tensor | None
_NormOptions: TypeAlias = tuple[float, int]
_Workspace: TypeAlias = tuple[_Address, int]
# eps, the mode of PB-Relax, what is added to weights, whether rows are rounded before they are multiplied.
_RmsOptions: TypeAlias = tuple[float, int, float, bool]
# Seeds, what is added to positions, temperature, top_k, the sum of the logits.
_Drawing: TypeAlias = tuple[_Integers, int, float, int, Tensor | None]
# Address, stride of a row, ids, tokens, dtype.
_Logits: TypeAlias = tuple[_Address, int, int, int, int, _Address, float, int]

has_cuda: bool

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def is_amd() -> bool: ...
def parallel_runtime() -> str: ...
def free_workspaces() -> int: ...
def signature(recording: bool, *arguments: object) -> object: ...
def stable_softmax_fwd_cpu(
    scores: _Address,
    mask: _Address,
    probs: _Address,
    shape: tuple[int, int, int, int],
    scores_stride: tuple[int, int, int, int],
    mask_stride: tuple[int, int, int, int],
    alpha: float,
    scale: float,
    causal: bool,
    dtype: int,
    threads: int,
) -> None: ...
def stable_softmax_bwd_cpu(
    dprobs: _Address,
    probs: _Address,
    dscores: _Address,
    rows: int,
    N: int,
    factor: float,
    dtype: int,
    threads: int,
) -> None: ...
def layer_norm_fwd_cpu(
    x: _Address,
    y: _Address,
    weight: _Parameter,
    bias: _Parameter,
    stats: _Address,
    shape: _RowShape,
    options: _NormOptions,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def layer_norm_bwd_cpu(
    dy: _Address,
    x: _Address,
    dx: _Address,
    weight: _Parameter,
    dweight: _Parameter,
    dbias: _Parameter,
    stats: _Address,
    shape: _RowShape,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def sandwich_layer_norm_fwd_cpu(
    branch: Tensor | None,
    residual: _Address,
    residual_out: _Address,
    normed: Tensor | None,
    parameters: tuple[_Parameter, _Parameter, _Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    options: _NormOptions,
    dropout: _Dropout,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def sandwich_layer_norm_bwd_cpu(
    dresidual_out: _Address,
    dnormed: Tensor | None,
    branch: Tensor | None,
    residual_out: _Address,
    dbranch: _Address,
    dresidual: _Address,
    weights: tuple[_Parameter, _Parameter],
    gradients: tuple[_Parameter, _Parameter, _Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    dropout: _Dropout,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def rms_norm_fwd_cpu(
    x: _Address,
    y: _Address,
    weight: _Parameter,
    stats: _Address,
    shape: _RowShape,
    options: _RmsOptions,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def rms_norm_bwd_cpu(
    dy: _Address,
    x: _Address,
    dx: _Address,
    weight: _Parameter,
    weight_offset: float,
    dweight: _Parameter,
    stats: _Address,
    shape: _RowShape,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def sandwich_rms_norm_fwd_cpu(
    branch: Tensor | None,
    residual: _Address,
    residual_out: _Address,
    normed: Tensor | None,
    weights: tuple[_Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    options: _RmsOptions,
    dropout: _Dropout,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def sandwich_rms_norm_bwd_cpu(
    dresidual_out: _Address,
    dnormed: Tensor | None,
    branch: Tensor | None,
    residual_out: _Address,
    dbranch: _Address,
    dresidual: _Address,
    weights: tuple[_Parameter, _Parameter],
    weight_offset: float,
    gradients: tuple[_Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    dropout: _Dropout,
    workspace: _Workspace,
    threads: int,
) -> None: ...
def linear_cross_entropy_reduce_cpu(
    logits: _Logits,
    target: _Address,
    logit_max: _Address,
    total: _Address,
    picked: _Address,
    sum: _Address,
    predicted: _Address,
    threads: int,
) -> None: ...
def linear_cross_entropy_gradient_cpu(
    logits: _Logits,
    objective: tuple[float, float, float],
    target: _Address,
    coefficient: _Address,
    logit_max: _Address,
    total: _Address,
    dbias: _Address,
    threads: int,
) -> None: ...
def linear_cross_entropy_product_cpu(
    a: Tensor | None,
    b: Tensor | None,
    out: Tensor | None,
    add: bool,
    low: _Address,
    last: bool,
    threads: int,
) -> None: ...
def three_region_attention_fwd_cpu(
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: _Strided,
    lse: _Address,
    shape: tuple[int, int, int, int, int],
    layout: _Layout,
    scale: float,
    dropout: _Dropout,
    dtype: int,
    sorted_pivots: _Address,
    threads: int,
) -> None: ...
def three_region_attention_bwd_cpu(
    inputs: tuple[_Strided, ...],
    lse: _Address,
    dlse: _Address,
    gradients: tuple[_Strided, _Strided, _Strided],
    shape: tuple[int, int, int, int, int],
    layout: _Layout,
    scale: float,
    dropout: _Dropout,
    dtype: int,
    sorted_pivots: _Address,
    workspace: tuple[_Address, _Address, _Address],
    threads: int,
) -> None: ...
def decode_attention_cpu(
    q: _Strided,
    k_cache: _Strided,
    v_cache: _Strided,
    lengths: _Integers,
    out: _Strided,
    layout: _Layout,
    scale: float,
    splits: tuple[int, int, _Address, _Address],
    threads: int,
) -> None: ...
def decode_linear_cpu(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    gelu: bool,
    threads: int,
) -> None: ...

class DecodeStack:
    """The tensors of a LayerStack, which it holds, by their addresses."""

    def __init__(self, tensors: list[Tensor | None]) -> None: ...

def decode_step_cpu(
    x: Tensor | None,
    y: Tensor | None,
    head: Tensor | None,
    stack: DecodeStack,
    cache: Tensor | None,
    lengths: _Integers,
    layout: _Layout,
    options: _NormOptions,
    threads: int,
) -> None: ...
def draw_step_cpu(
    rows: tuple[_Integers, ...],
    embedding: tuple[Tensor | None, ...],
    head: Tensor | None,
    stack: DecodeStack,
    cache: Tensor | None,
    lengths: _Integers,
    options: _NormOptions,
    drawing: _Drawing,
    threads: int,
) -> None: ...
def draw_tokens_cpu(
    logits: Tensor | None,
    positions: _Integers,
    drawn: _Integers,
    drawing: _Drawing,
    threads: int,
) -> None: ...
def local_attention_2d_fwd_cpu(
    inputs: tuple[_Strided, ...],
    out: _Strided,
    lse: _Address,
    extra_mask: _Address,
    shape: tuple[int, int, int, int, int],
    window: _Window,
    scale: float,
    dropout: _Dropout,
    dtype: int,
    threads: int,
) -> None: ...
def local_attention_2d_bwd_cpu(
    inputs: tuple[_Strided, ...],
    lse: _Address,
    dlse: _Address,
    gradients: tuple[_Strided, ...],
    extra_mask: _Address,
    shape: tuple[int, int, int, int, int],
    window: _Window,
    scale: float,
    dropout: _Dropout,
    dtype: int,
    threads: int,
) -> None: ...
def merge_attention_fwd_cpu(
    outputs: tuple[_Strided, ...],
    lses: tuple[_Address, ...],
    out: _Strided,
    lse: _Address,
    shape: tuple[int, ...],
    dtype: int,
    threads: int,
) -> None: ...
def merge_attention_bwd_cpu(
    outputs: tuple[_Strided, ...],
    lses: tuple[_Address, ...],
    dout: _Strided,
    dlse: _Address,
    doutputs: tuple[_Strided, ...],
    dlses: tuple[_Address, ...],
    shape: tuple[int, ...],
    dtype: int,
    threads: int,
) -> None: ...
def stable_softmax_fwd_cuda(
    scores: _Address,
    mask: _Address,
    probs: _Address,
    shape: tuple[int, int, int, int],
    scores_stride: tuple[int, int, int, int],
    mask_stride: tuple[int, int, int, int],
    alpha: float,
    scale: float,
    causal: bool,
    dtype: int,
    stream: int,
) -> None: ...
def stable_softmax_bwd_cuda(
    dprobs: _Address,
    probs: _Address,
    dscores: _Address,
    rows: int,
    N: int,
    factor: float,
    dtype: int,
    stream: int,
) -> None: ...
def layer_norm_fwd_cuda(
    x: _Address,
    y: _Address,
    weight: _Parameter,
    bias: _Parameter,
    stats: _Address,
    shape: _RowShape,
    options: _NormOptions,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def layer_norm_bwd_cuda(
    dy: _Address,
    x: _Address,
    dx: _Address,
    weight: _Parameter,
    dweight: _Parameter,
    dbias: _Parameter,
    stats: _Address,
    shape: _RowShape,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def sandwich_layer_norm_fwd_cuda(
    branch: Tensor | None,
    residual: _Address,
    residual_out: _Address,
    normed: Tensor | None,
    parameters: tuple[_Parameter, _Parameter, _Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    options: _NormOptions,
    dropout: _Dropout,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def sandwich_layer_norm_bwd_cuda(
    dresidual_out: _Address,
    dnormed: Tensor | None,
    branch: Tensor | None,
    residual_out: _Address,
    dbranch: _Address,
    dresidual: _Address,
    weights: tuple[_Parameter, _Parameter],
    gradients: tuple[_Parameter, _Parameter, _Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    dropout: _Dropout,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def rms_norm_fwd_cuda(
    x: _Address,
    y: _Address,
    weight: _Parameter,
    stats: _Address,
    shape: _RowShape,
    options: _RmsOptions,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def rms_norm_bwd_cuda(
    dy: _Address,
    x: _Address,
    dx: _Address,
    weight: _Parameter,
    weight_offset: float,
    dweight: _Parameter,
    stats: _Address,
    shape: _RowShape,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def sandwich_rms_norm_fwd_cuda(
    branch: Tensor | None,
    residual: _Address,
    residual_out: _Address,
    normed: Tensor | None,
    weights: tuple[_Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    options: _RmsOptions,
    dropout: _Dropout,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def sandwich_rms_norm_bwd_cuda(
    dresidual_out: _Address,
    dnormed: Tensor | None,
    branch: Tensor | None,
    residual_out: _Address,
    dbranch: _Address,
    dresidual: _Address,
    weights: tuple[_Parameter, _Parameter],
    weight_offset: float,
    gradients: tuple[_Parameter, _Parameter],
    stats: _Address,
    shape: _RowShape,
    dropout: _Dropout,
    workspace: _Workspace,
    stream: _Address,
) -> None: ...
def three_region_attention_fwd_cuda(
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: _Strided,
    lse: _Address,
    shape: tuple[int, int, int, int, int],
    layout: _Layout,
    scale: float,
    dropout: _Dropout,
    dtype: int,
    sorted_pivots: _Address,
    stream: int,
) -> None: ...
def three_region_attention_fwd_sm90(
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: _Strided,
    lse: _Address,
    residuals: _Address,
    index: tuple[int, int, int, int],
    scores: tuple[float, float],
    stream: int,
) -> None: ...
def three_region_attention_bwd_cuda(
    inputs: tuple[_Strided, ...],
    lse: _Address,
    dlse: _Address,
    gradients: tuple[_Strided, _Strided, _Strided],
    shape: tuple[int, int, int, int, int],
    layout: _Layout,
    scale: float,
    dropout: _Dropout,
    dtype: int,
    sorted_pivots: _Address,
    workspace: tuple[_Address, _Address, _Address],
    stream: int,
) -> None: ...
def decode_attention_cuda(
    q: _Strided,
    k_cache: _Strided,
    v_cache: _Strided,
    lengths: _Integers,
    out: _Strided,
    layout: _Layout,
    scale: float,
    splits: tuple[int, int, _Address, _Address],
    stream: int,
) -> None: ...
