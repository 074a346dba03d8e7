# SPDX-License-Identifier: Apache-2.0
"""Breaks the kernels one by one in a copy of the tree, and says whether the tests notice.

    python -m tests.mutations            all of them, with the tests first run unbroken
    python -m tests.mutations --list     the names
    python -m tests.mutations norm xent  those whose names contain one of the words

A tool, not a test: it takes the better part of an hour. The working tree is only read; the copy lies in
``build/mutations`` and keeps what it compiled. A mutation that is missed makes the exit status 1, and so does
one whose text is no longer found in the kernels: keep the table in step with them.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutations"


@dataclass(frozen=True)
class Mutation:
    """``before`` becomes ``after`` in the one file of ``where`` (a glob) that has it, wherever it stands."""

    name: str
    where: str
    before: str
    after: str
    tests: str  # a file of tests/kernels, then words that pytest -k joins with "and"


# Few tests, and quick ones, that run the code in question.
_ATTENTION = "three_region_attention"
_CPU_ATTENTION = (
    f"{_ATTENTION} (test_forward_and_backward or test_dropout_and_lse) and cpu and "
    "(any_order or D32 or past_an_edge or grouped_heads)"
)
_TRITON_ATTENTION = f"{_ATTENTION} test_small_triton_tiles or (test_dropout_and_lse and triton and any_order)"
_TRITON_LIMITS = f"{_ATTENTION} test_queries_and_keys_at_the_fp16_limit and triton"
_CPU_BOTH_SIDES = f"{_ATTENTION} test_forward_and_backward and cpu and both_sides"
_TRITON_BOTH_SIDES = f"{_ATTENTION} test_small_triton_tiles and both_sides"
_CUDA_BOTH_SIDES = "cuda_kernels test_forward_and_backward and both_sides"
_CPU_STARTS = "starts (test_a_sample or test_dropout or test_decoding) and cpu"
_TRITON_STARTS = "starts (test_a_sample or test_dropout or test_decoding) and triton"
_CUDA_STARTS = "starts (test_a_sample or test_dropout or test_decoding) and cuda"
_CUDA_ATTENTION = "cuda_kernels test_forward_and_backward and (any_order or grouped_heads or D32)"
_CPU_DECODE = "decode_attention (test_error_budget or test_edges) and cpu"
_TRITON_DECODE = (
    "decode_attention_triton test_dtypes or (test_edges_of_tiles_and_splits and (several or one-2))"
)
_CUDA_DECODE = "cuda_kernels test_decode and not properties"
_CPU_STEP = "decode_step (test_error_budget or test_modes)"
_CPU_LINEAR = "decode_linear (test_error_budget or test_edges or test_several or test_gelu)"
_CPU_PANELS = "decode_linear test_many_rows"
_DRAW, _DRAW_STEP, _PLAN = "model/sampling the_kernel", "model/whole_step test", "model/decoder test"
_TRITON_LINEAR = "decode_linear (test_every_number or test_edges_of_pieces or test_nothing_beside)"
_CPU_LOCAL = (
    "local_attention_2d (test_forward_and_backward or test_dropout or test_narrow or fp16_limit) and cpu"
)
# Missed, since skipped, where the processor does not multiply bfloat16.
_BF16_LOCAL = "local_attention_2d test_products_in_bfloat16"
_TRITON_LOCAL = "local_attention_2d test_small_triton_tiles and (causal or grouped_heads)"
_CPU_MERGE = "merge_attention (test_forward_and_backward or test_a_query or test_strides) and cpu"
_TRITON_MERGE = (
    "merge_attention (test_forward_and_backward or test_a_query or test_strides or test_weights) and triton"
)
_CPU_NORM = "layer_norm (test_forward_and_backward or test_constant_rows or test_extreme_rows) and cpu"
_CPU_SANDWICH = "sandwich_layer_norm (test_forward_and_backward or test_every_backend_draws) and cpu"
_TRITON_NORM = "layer_norm (test_forward_and_backward or test_constant_rows) and triton and not two_tiles"
_TRITON_SANDWICH = "sandwich_layer_norm test_forward_and_backward and triton and not two_tiles"
_CUDA_NORM = "layer_norm (test_forward_and_backward or test_constant_rows) and cuda"
_CUDA_SANDWICH = "sandwich_layer_norm test_forward_and_backward and cuda"
_CPU_RMS = "rms_norm (test_forward_and_backward or test_where or test_extreme_rows) and cpu"
_CPU_SANDWICH_RMS = "sandwich_rms_norm (test_forward_and_backward or test_a_narrow) and cpu"
_TRITON_RMS = "rms_norm (test_forward_and_backward or test_where) and triton and not two_tiles"
_TRITON_SANDWICH_RMS = "sandwich_rms_norm test_forward_and_backward and triton and not two_tiles"
_CUDA_RMS = "rms_norm (test_forward_and_backward or test_where) and cuda"
_CUDA_SANDWICH_RMS = "sandwich_rms_norm (test_forward_and_backward or test_a_narrow) and cuda"
_NARROW_NORMED = "sandwich_rms_norm test_a_narrow_normed"
_CPU_SOFTMAX = "stable_softmax (test_forward_and_backward or test_long_rows) and cpu"
_TRITON_SOFTMAX = "stable_softmax (test_forward_and_backward or test_long_rows) and triton"
_CUDA_SOFTMAX = "stable_softmax (test_forward_and_backward or test_long_rows) and cuda"
_CPU_XENT = "linear_cross_entropy (test_forward_and_backward or test_one_chunk or test_steps) and cpu"
_CPU_XENT_OPTIONS = "linear_cross_entropy (test_options or test_steps_with_options) and cpu"
_CPU_PRODUCT = "linear_cross_entropy test_product"
_CPU_SUM = "linear_cross_entropy (test_products_summed or test_summed_in_24)"
_CHUNKED_XENT = "linear_cross_entropy (test_forward_and_backward or loss_scale) and chunked"
_TRITON_XENT = "linear_cross_entropy (test_forward_and_backward or test_steps) and triton"
_TRITON_XENT_OPTIONS = "linear_cross_entropy (test_options or test_steps_with_options) and triton"

MUTATIONS = [
    # ---- three_region_attention, CPU
    Mutation("attention-cpu-window", "csrc/common/regions.h",
             "/ block_size - window_blocks + 1;", "/ block_size - window_blocks + 2;",
             _CPU_ATTENTION),
    Mutation("attention-cpu-diagonal", "csrc/common/regions.h",
             "(key <= window_last)", "(key < window_last)",
             _CPU_ATTENTION),
    Mutation("attention-cpu-far-edge", "csrc/common/regions.h",
             "V(key < window_start)", "V(key <= window_start)",
             _CPU_ATTENTION),
    Mutation("attention-cpu-far-edge-of-both-sides", "csrc/common/regions.h",
             "((key > window_last)", "((key >= window_last)", _CPU_BOTH_SIDES),
    Mutation("attention-cpu-slots-twice", "csrc/three_region_attention/*",
             "std::max(s.far, round_down(plan.pivots_before(b, stop), grain));",
             "round_down(plan.pivots_before(b, stop), grain);", _CPU_BOTH_SIDES),
    Mutation("attention-cpu-first-run-leaves-queries-out", "csrc/three_region_attention/*",
             "if (on_diagonal && begun_) run.column", "if (on_diagonal) run.column",
             "three_region_attention test_no_layout and cpu"),
    Mutation("attention-cpu-diagonal-too-far-right", "csrc/three_region_attention/*",
             "round_down(from - s_.first, kPiece<kBf16>);", "round_up(from - s_.first + 1, kPiece<kBf16>);",
             _CPU_STARTS),
    Mutation("loops-help-nobody", "csrc/common/parallel.cpp",
             "shares_[(thread + i) % count_]", "shares_[thread % count_]", "layer_norm test_fewer_threads"),
    Mutation("attention-cpu-blocks-from-0", "csrc/common/regions.h",
             "origin + first_block * block_size : origin", "first_block * block_size : origin", _CPU_STARTS),
    Mutation("attention-cpu-padding-is-a-pivot", "csrc/three_region_attention/*",
             "std::fill(rank, rank + origin, -1);", "", _CPU_STARTS),
    Mutation("attention-cpu-padding-gives-something", "csrc/three_region_attention/*",
             "for (int64_t c = 0; c < s.blind; ++c) lanes.sum[c] = kInf;", "", _CPU_STARTS),
    Mutation("attention-cpu-gradient-of-padding", "csrc/three_region_attention/*",
             "lanes.lse[c] = std::numeric_limits<float>::max();", "lanes.lse[c] = 0.0f;", _CPU_STARTS),
    Mutation("attention-cpu-bias-twice", "csrc/three_region_attention/*",
             "const float add = far ? bias : 0.0f;", "const float add = far ? 2.0f * bias : 0.0f;",
             _CPU_ATTENTION),
    Mutation("attention-cpu-no-rescale", "csrc/common/weights.h",
             "raise ? exp2(old - wanted) : broadcast(1.0f)", "broadcast(1.0f)",
             f"{_ATTENTION} test_logits_past_the_fp16_limit and cpu"),
    Mutation("attention-cpu-keep-scale", "csrc/three_region_attention/*",
             "args.common.dropout.keep_scale / load(lanes.sum + c)", "1.0f / load(lanes.sum + c)",
             _CPU_ATTENTION),
    Mutation("attention-cpu-keep-scale-backward", "csrc/three_region_attention/*",
             "broadcast(args.common.dropout.keep_scale)", "broadcast(1.0f)",
             _CPU_ATTENTION),
    Mutation("attention-cpu-no-delta", "csrc/three_region_attention/*",
             "ds = p * (dp - delta[i]);", "ds = p * dp;",
             _CPU_ATTENTION),
    Mutation("attention-cpu-no-dlse", "csrc/three_region_attention/*",
             "(args.dlse == nullptr ? 0.0f : args.dlse[row + c])", "0.0f",
             _CPU_ATTENTION),
    Mutation("attention-cpu-pivot-dk", "csrc/three_region_attention/*",
             "if (rank >= 0) add(rank);", "",
             _CPU_ATTENTION),
    Mutation("attention-cpu-dq-scale", "csrc/three_region_attention/*",
             "b, h, s, args.common.scale, m.stage", "b, h, s, 1.0f, m.stage",
             _CPU_ATTENTION),
    Mutation("attention-cpu-exponential", "csrc/common/weights.h",
             "p = broadcast(0.00015461444854736328f);", "p = broadcast(0.0f);",
             _CPU_ATTENTION),
    Mutation("attention-cpu-exponential-of-bf16", "csrc/common/weights.h",
             "if (kBf16) {\n        p = broadcast", "if (true) {\n        p = broadcast",
             _CPU_ATTENTION),
    Mutation("attention-cpu-bf16-weights", "csrc/three_region_attention/*",
             "p = dropped;", "p = round_to_bfloat16(dropped);",
             _CPU_ATTENTION),
    # ---- three_region_attention, Triton
    Mutation("attention-triton-no-rescale", "cogview_kernels/_attention_triton.py",
             "acc * shrink[:, None]", "acc", _TRITON_ATTENTION),
    Mutation("attention-triton-no-rescale-in-float32", "cogview_kernels/_attention_triton.py",
             "tl.fma(acc, shrink[:, None],", "tl.fma(acc, 1.0,", _TRITON_ATTENTION),
    Mutation("attention-triton-bias", "cogview_kernels/_attention_triton.py",
             "peak = tl.fma(top, factor, bias)", "peak = tl.fma(top, factor, 0.0)",
             _TRITON_ATTENTION),
    Mutation("attention-triton-bias-of-the-gradient", "cogview_kernels/three_region_attention/*.py",
             "tl.load(stats_ptr + TP) - bias", "tl.load(stats_ptr + TP)", _TRITON_ATTENTION),
    Mutation("attention-triton-bias-of-the-one-peak", "cogview_kernels/three_region_attention/*.py",
             "peak -= bias", "peak -= 0.0", _TRITON_ATTENTION),
    Mutation("attention-triton-fused-exponent", "cogview_kernels/_attention_triton.py",
             "tl.fma(s - top[:, None], factor, (peak - new_max)[:, None])",
             "tl.fma(s, factor, (bias - new_max)[:, None])", _TRITON_LIMITS),
    Mutation("attention-triton-rest-of-the-peak", "cogview_kernels/_attention_triton.py",
             "tl.fma(top, factor, -peak) + bias, rest)", "0.0 * peak, rest)", _TRITON_LIMITS),
    Mutation("attention-triton-ranks", "cogview_kernels/three_region_attention/*.py",
             "tl.where(mark == 1, rank, -1)", "rank", _TRITON_ATTENTION),
    Mutation("attention-triton-window", "cogview_kernels/_regions_triton.py",
             "// block_size - window_blocks + 1, 0)", "// block_size - window_blocks + 2, 0)",
             _TRITON_ATTENTION),
    Mutation("attention-triton-tile-edge", "cogview_kernels/_regions_triton.py",
             "eights < (end - start)", "eights <= (end - start)", _TRITON_ATTENTION),
    Mutation("attention-triton-prefix", "cogview_kernels/three_region_attention/*.py",
             "index[None, :] < count[:, None]", "index[None, :] <= count[:, None]", _TRITON_ATTENTION),
    Mutation("attention-triton-far-first", "cogview_kernels/_regions_triton.py",
             "// block_size + window_blocks) * block_size", "// block_size + window_blocks - 1) * block_size",
             _TRITON_ATTENTION),
    Mutation("attention-triton-suffix", "cogview_kernels/three_region_attention/*.py",
             "(index[None, :] >= count[:, None])", "(index[None, :] > count[:, None])", _TRITON_BOTH_SIDES),
    Mutation("attention-triton-places-twice", "cogview_kernels/three_region_attention/*.py",
             "after = tl.maximum(after, far_stop)", "after = after", _TRITON_BOTH_SIDES),
    Mutation("attention-triton-far-last", "cogview_kernels/three_region_attention/*.py",
             "seen = (rows[None, :] < first[:, None])", "seen = (rows[None, :] <= first[:, None])",
             _TRITON_BOTH_SIDES),
    Mutation("attention-triton-padding-is-a-pivot", "cogview_kernels/three_region_attention/*.py",
             "mask=(pivot >= origin)", "mask=(pivot >= 0)", _TRITON_STARTS),
    Mutation("attention-triton-blocks-from-0", "cogview_kernels/_regions_triton.py",
             "(query - origin) // block_size - window_blocks + 1", "query // block_size - window_blocks + 1",
             _TRITON_STARTS),
    Mutation("attention-triton-gradient-of-padding", "cogview_kernels/three_region_attention/*.py",
             'row_max = tl.where(rows < origin, float("inf"), row_max)', "row_max = row_max", _TRITON_STARTS),
    Mutation("attention-triton-keep-scale", "cogview_kernels/three_region_attention/*.py",
             "dp = tl.where(keeps, dp * keep_scale, 0.0)", "dp = tl.where(keeps, dp, 0.0)",
             _TRITON_ATTENTION),
    Mutation("attention-triton-lse", "cogview_kernels/three_region_attention/*.py",
             "(row_max + rest) * LN2", "row_max * LN2 + rest",
             _TRITON_ATTENTION),
    Mutation("attention-triton-bf16-weights", "cogview_kernels/_attention_triton.py",
             "ds.to(k.dtype), k, dq", "ds.to(tl.float16).to(k.dtype), k, dq", _TRITON_ATTENTION),
    # ---- launches of compiled Triton kernels
    Mutation("launch-width-of-the-seed", "cogview_kernels/_triton.py",
             'return "32 bits" if -(2**31) <= seed < 2**31 else "64 bits"', 'return "32 bits"',
             "launch test_what_is_run_directly"),
    Mutation("launch-dtypes", "cogview_kernels/_triton.py",
             "kinds.append(x.dtype)", "kinds.append(0)", "launch test_what_is_run_directly"),
    Mutation("launch-misaligned", "cogview_kernels/_triton.py",
             "compiled is None or misaligned % 16 or", "compiled is None or",
             "launch test_a_misaligned_tensor_is_bound_each_time"),
    Mutation("launch-unwatched", "cogview_kernels/_triton.py",
             " or _is_watched():", ":", "launch test_hooks_see_each_launch"),
    # ---- three_region_attention, CUDA
    Mutation("attention-cuda-no-rescale", "csrc/three_region_attention/*.cuh",
             "out[m][d].x[i] *= f;", "out[m][d].x[i] *= 1.0f;", _CUDA_ATTENTION),
    Mutation("attention-cuda-dq-scale", "csrc/three_region_attention/*.cuh",
             "eight[i] *= a.scale;\n            if (at <= last) *reinterpret_cast<uint4*>(to + at * args.dq",
             "eight[i] *= 1.0f;\n            if (at <= last) *reinterpret_cast<uint4*>(to + at * args.dq",
             _CUDA_ATTENTION),
    Mutation("attention-cuda-bias", "csrc/three_region_attention/backward.cuh",
             "const float bias = FAR ? a.layout.pivot_bias : 0.0f;", "const float bias = 0.0f;",
             _CUDA_ATTENTION),
    Mutation("attention-cuda-dlse", "csrc/three_region_attention/*.cuh",
             "args.dlse == nullptr ? dot : dot - args.dlse[at]", "dot", _CUDA_ATTENTION),
    Mutation("attention-cuda-suffix", "csrc/three_region_attention/*.cuh",
             "slot < prefix ? slot", "slot <= prefix ? slot", _CUDA_BOTH_SIDES),
    Mutation("attention-cuda-queries-after-the-pause", "csrc/three_region_attention/*.cuh",
             "next_first == pause) next_first = resume;", "next_first == pause) next_first = pause;",
             _CUDA_BOTH_SIDES),
    Mutation("attention-cuda-gradient-of-padding", "csrc/three_region_attention/*.cuh",
             "if (!CAUSAL && terms.lse == -INFINITY) terms.lse = INFINITY;", "", _CUDA_STARTS),
    Mutation("attention-cuda-padding-is-a-pivot", "csrc/three_region_attention/*.cuh",
             "pivot < a.layout.origin_of(b, T) ||", "pivot < 0 ||", _CUDA_STARTS),
    Mutation("attention-cuda-padding-gives-something", "csrc/three_region_attention/*.cuh",
             "const bool blind = query < a.layout.origin_of(b, T);", "const bool blind = false;",
             _CUDA_STARTS),
    Mutation("attention-cuda-window-of-both-sides", "csrc/three_region_attention/*.cuh",
             "window_last = a.layout.window_last(last, origin, T, CAUSAL);",
             "window_last = a.layout.window_last(last, origin, T, true);", _CUDA_BOTH_SIDES),
    # ---- local_attention_2d
    Mutation("local-cpu-row-above", "csrc/local_attention_2d/*",
             "(down >= -window.row_radius)", "(down > -window.row_radius)", _CPU_LOCAL),
    Mutation("local-cpu-column", "csrc/local_attention_2d/*",
             "VecI last = own_column + window.column_radius;", "VecI last = own_column + 1;", _CPU_LOCAL),
    Mutation("local-cpu-causal-row", "csrc/local_attention_2d/*",
             "last = down == 0 ? own_column : last;", "", _CPU_LOCAL),
    Mutation("local-cpu-key-rows", "csrc/local_attention_2d/*",
             "last / window.query_scale + below + 1)", "last / window.query_scale + below)", _CPU_LOCAL),
    Mutation("local-cpu-text-mask", "csrc/local_attention_2d/*",
             "kPanelVectors && seen[e] == 0", "kPanelVectors && seen[e] == 2", _CPU_LOCAL),
    Mutation("local-cpu-no-rescale", "csrc/local_attention_2d/*",
             "load(out + d * kQueries + c) * by", "load(out + d * kQueries + c)", _CPU_LOCAL),
    Mutation("local-cpu-keep-scale", "csrc/local_attention_2d/*",
             "args.common.dropout.keep_scale / load(lanes.sum + c)", "1.0f / load(lanes.sum + c)",
             _CPU_LOCAL),
    Mutation("local-cpu-dropout-of-text", "csrc/local_attention_2d/*",
             "? w : VecF{}", "| (VecI{} - int32_t(slot >= plan.grid)) ? w : VecF{}", _CPU_LOCAL),
    Mutation("local-cpu-no-delta", "csrc/local_attention_2d/*",
             "p * (dp - delta[i])", "p * dp", _CPU_LOCAL),
    Mutation("local-cpu-no-dlse", "csrc/local_attention_2d/*",
             "(args.dlse == nullptr ? 0.0f : args.dlse[first + query])", "0.0f", _CPU_LOCAL),
    Mutation("local-cpu-parts", "csrc/local_attention_2d/*",
             "for (int64_t i = 0; i < parts; ++i) {\n            const HeadPart",
             "for (int64_t i = 0; i < 1; ++i) {\n            const HeadPart", _CPU_LOCAL),
    Mutation("local-cpu-dk-scale", "csrc/local_attention_2d/*",
             "store_row(total[0], scale,", "store_row(total[0], 1.0f,", _CPU_LOCAL),
    Mutation("local-cpu-heads-of-the-first-turn", "csrc/local_attention_2d/forward_cpu.cpp",
             "(done + i) % plan.Hkv * plan.group", "i % plan.Hkv * plan.group", _CPU_LOCAL),
    Mutation("local-cpu-samples-of-the-first-turn", "csrc/local_attention_2d/*",
             "return (first + i) / plan.Hkv;", "return i / plan.Hkv;", _CPU_LOCAL),
    Mutation("local-bf16-row-below", "csrc/local_attention_2d/*",
             "(down <= plan.window.row_radius)", "(down < plan.window.row_radius)", _BF16_LOCAL),
    Mutation("local-bf16-past-the-last-row", "csrc/local_attention_2d/*",
             "plan.row_of(place) < plan.window.height", "true", _BF16_LOCAL),
    Mutation("local-bf16-first-column", "csrc/local_attention_2d/*",
             "column - window.column_radius));", "column - window.column_radius - 1));", _BF16_LOCAL),
    Mutation("local-bf16-causal-row", "csrc/local_attention_2d/*",
             "end = down == 0 ? own : last;", "", _BF16_LOCAL),
    Mutation("local-bf16-block-of-rows", "csrc/local_attention_2d/*",
             "rows.begin * width / kBlock", "parts(rows.begin * width, kBlock)", _BF16_LOCAL),
    Mutation("local-bf16-cells-of-finer-queries", "csrc/local_attention_2d/*",
             "(queries + window.query_scale - 2) / window.query_scale + 1",
             "parts(queries, window.query_scale)", _BF16_LOCAL),
    Mutation("local-bf16-strip-past-the-grid", "csrc/local_attention_2d/*",
             "&& column_of(strip, i) < window.width", "", _BF16_LOCAL),
    Mutation("local-bf16-text-mask", "csrc/local_attention_2d/*",
             "mask[b * plan.E + e] != 0", "mask[e] != 0", _BF16_LOCAL),
    Mutation("local-bf16-no-rescale", "csrc/local_attention_2d/*",
             "store(out + d, load(out + d) * by);", "store(out + d, load(out + d));", _BF16_LOCAL),
    Mutation("local-bf16-no-rescale-of-sums", "csrc/local_attention_2d/*",
             "load(work.sum + c * kLanes) * by", "load(work.sum + c * kLanes)", _BF16_LOCAL),
    Mutation("local-bf16-keep-scale", "csrc/local_attention_2d/*",
             "dropout.keep_scale / sums[lane]", "dropout.keep_scale * 0.0f + 1.0f / sums[lane]", _BF16_LOCAL),
    Mutation("local-bf16-slots-of-text", "csrc/local_attention_2d/*",
             "? plan.grid + place", "? place", _BF16_LOCAL),
    Mutation("local-bf16-heads-of-the-first-turn", "csrc/local_attention_2d/forward_bf16.h",
             "(first + i) % plan.Hkv * plan.group", "i % plan.Hkv * plan.group", _BF16_LOCAL),
    Mutation("local-bf16-second-product", "csrc/local_attention_2d/*",
             "tile_multiply_add<3, 4, 5>();", "tile_multiply_add<3, 4, 7>();", _BF16_LOCAL),
    Mutation("local-triton-causal", "cogview_kernels/local_attention_2d/*.py",
             "(down == 0) & (across <= 0)", "(down == 0) & (across < 0)", _TRITON_LOCAL),
    Mutation("local-triton-column", "cogview_kernels/local_attention_2d/*.py",
             "(across >= -column_radius)", "(across > -column_radius)", _TRITON_LOCAL),
    Mutation("local-triton-text-mask", "cogview_kernels/local_attention_2d/*.py",
             "if HAS_MASK:\n        seen = seen &", "if HAS_MASK:\n        seen = seen |", _TRITON_LOCAL),
    Mutation("local-triton-no-delta", "cogview_kernels/local_attention_2d/*.py",
             "ds = p * (dp - delta[None, :])", "ds = p * dp", _TRITON_LOCAL),
    # ---- decode_step, CPU
    Mutation("step-cpu-places", "csrc/decode_step/*",
             "at = lengths_after_[b] - a_.T + row % a_.T", "at = lengths_after_[b] - a_.T", _CPU_STEP),
    Mutation("step-cpu-values", "csrc/decode_step/*",
             "(3 * row + 1 + which)", "(3 * row + 1)", _CPU_STEP),
    Mutation("step-cpu-final-norm", "csrc/decode_step/*",
             "last ? a_.final_norm", "last ? a_.layers[0].attention_pre", _CPU_STEP),
    Mutation("step-cpu-trunk", "csrc/decode_step/*",
             "residual = x_.data();", "", _CPU_STEP),
    # ---- drawing, CPU
    Mutation("draw-cpu-top-k", "csrc/draw_tokens/*", "found >= k", "found > k", _DRAW),
    Mutation("draw-cpu-noise", "csrc/draw_tokens/*", "uint64_t(i + j + 1)", "uint64_t(i + j)", _DRAW),
    Mutation("draw-cpu-seeds", "csrc/draw_tokens/*", "a.seeds[n / a.T]", "a.seeds[0]", _DRAW),
    Mutation("draw-cpu-first", "csrc/draw_tokens/*",
             "uint64_t(a.first + a.positions[n])", "uint64_t(a.positions[n])", _DRAW),
    Mutation("draw-cpu-past-the-row", "csrc/draw_tokens/*", "int64_t j = a.V; j < padded",
             "int64_t j = a.V + 1; j < padded", _DRAW),
    Mutation("draw-cpu-best", "csrc/draw_tokens/*", "best = arrival, at = i + j", "at = i + j", _DRAW),
    Mutation("draw-cpu-temperature", "csrc/draw_tokens/*", "kLog2e / double(a.temperature)", "kLog2e", _DRAW),
    Mutation("draw-cpu-total", "csrc/draw_tokens/*", "*a.total += sums", "*a.total = sums", _DRAW),
    Mutation("draw-step-restart", "csrc/draw_step/*",
             "a.lengths[b] >= a.restart[b]", "a.lengths[b] > a.restart[b] + 1", _DRAW_STEP),
    Mutation("draw-step-position", "csrc/draw_step/*", " + load(position + c, tag)", "", _DRAW_STEP),
    Mutation("draw-step-tokens", "csrc/draw_step/*",
             "a.tokens[b * a.W + a.done[b]]", "a.tokens[b * a.W]", _DRAW_STEP),
    Mutation("draw-step-lengths", "csrc/draw_step/*", "++a.lengths[b];", "", _DRAW_STEP),
    Mutation("draw-step-words", "csrc/draw_step/*",
             "check_below(a.last[b], a.num_words", "check_below(0, a.num_words", _DRAW_STEP),
    Mutation("draw-step-watched", "cogview_kernels/_draw.py",
             "type(head) not in PLAIN or is_watched()", "type(head) not in PLAIN", _DRAW_STEP),
    Mutation("plan-hooks", "cogview/model/decoder.py",
             "type(module), _hooks.is_unmodified(module)", "type(module), 0", _PLAN),
    Mutation("plan-weights", "cogview/model/decoder.py", "weight.data_ptr(), weight.dtype", "weight.dtype",
             _PLAN),
    Mutation("plan-eps", "cogview/model/decoder.py", 'of.get("eps")', "0", _PLAN),

    # ---- decode_linear, CPU
    Mutation("linear-cpu-last-part", "csrc/decode_linear/*",
             "if (k < stop) step(", "if (k + 1 < stop) step(", _CPU_LINEAR),
    Mutation("linear-pairs-across-the-end-of-a-row", "csrc/common/panels.h",
             "K % kPack != 0 || stride", "stride", _CPU_PANELS),
    Mutation("linear-inputs-before-the-last-run", "csrc/common/panels.h", "add || u > 0", "add", _CPU_PANELS),
    Mutation("linear-rows-of-the-first-panel", "csrc/decode_linear/decode_linear_cpu.cpp",
             "block + 16 * r, first + n + r", "block + 16 * r, n + r", _CPU_PANELS),
    Mutation("linear-inputs-of-the-first-run", "csrc/common/panels.h",
             "panel + u * kPanelColumns", "panel", _CPU_PANELS),
    Mutation("linear-no-inputs", "csrc/common/panels.h",
             "        do {\n", "        while (u < units_) {\n", "decode_step test_many_rows"),
    Mutation("linear-cpu-long-rows", "csrc/decode_linear/*",
             "start < K; start += kRun", "start < K; start += K", _CPU_LINEAR),
    Mutation("linear-cpu-odd-row", "csrc/decode_linear/*",
             "else if (rows == 2)", "else if (rows == 9)", _CPU_LINEAR),
    Mutation("linear-cpu-later-rows", "csrc/decode_linear/*",
             "sums.data + r * stride + o", "sums.data + o", _CPU_LINEAR),
    Mutation("linear-cpu-words-past-the-row", "csrc/decode_linear/*",
             "std::memset(to + r * width + K, 0, (width - K) * sizeof(BFloat16));",
             "std::memset(to + r * width + K, 255, (width - K) * sizeof(BFloat16));", _CPU_LINEAR),
    Mutation("linear-cpu-last-words", "csrc/decode_linear/*",
             "std::memcpy(padded, p, part.n * sizeof(BFloat16));\n    return load_bits",
             "std::memcpy(padded, p, (part.n - 1) * sizeof(BFloat16));\n    return load_bits",
             _CPU_LINEAR),
    Mutation("linear-cpu-halves-of-sums", "csrc/common/vec.h",
             "kLane % kOf + kHalf * kOf", "kLane % kOf + kHalf", _CPU_LINEAR),
    Mutation("linear-cpu-last-outputs", "csrc/decode_linear/*",
             "some(Constant<1>{}, some(Constant<kMost>{}, stride));", "some(Constant<kMost>{}, stride);",
             _CPU_LINEAR),
    Mutation("linear-cpu-chunk-of-bias", "csrc/decode_linear/*",
             "load(bias + o + j, tag)", "load(bias + j, tag)", _CPU_LINEAR),
    Mutation("linear-cpu-negative-gelu", "csrc/decode_linear/*",
             "(twice < 0.0f ? e : broadcast(1.0f))", "broadcast(1.0f)", _CPU_LINEAR),

    # ---- decode_linear, Triton
    Mutation("linear-triton-last-output", "cogview_kernels/decode_linear/triton_kernels.py",
             "inside = (o < O)", "inside = (o < O - 1)", _TRITON_LINEAR),
    Mutation("linear-triton-past-k", "cogview_kernels/decode_linear/triton_kernels.py",
             "mask=k < K, other", "mask=k <= K, other", _TRITON_LINEAR),
    Mutation("linear-triton-last-turn", "cogview_kernels/decode_linear/triton_kernels.py",
             "tl.range(0, K, PIECES", "tl.range(0, K - BLOCK_K, PIECES", _TRITON_LINEAR),
    Mutation("linear-triton-one-warp", "cogview_kernels/decode_linear/triton_kernels.py",
             "tl.sum(acc, axis=0)", "tl.max(acc, axis=0)", _TRITON_LINEAR),
    Mutation("linear-triton-groups-of-rows", "cogview_kernels/decode_linear/triton_kernels.py",
             "% groups * ROWS", "% groups", _TRITON_LINEAR),

    Mutation("merge-cpu-no-maximum", "csrc/merge_attention/*",
             "std::exp(a.lses[i][row] - top)", "std::exp(a.lses[i][row])", _CPU_MERGE),
    Mutation("merge-cpu-no-mean", "csrc/merge_attention/*",
             "(dots[i] - mean + dlse)", "(dots[i] + dlse)", _CPU_MERGE),
    Mutation("merge-cpu-nothing-seen", "csrc/merge_attention/*",
             "weights[i] = weights[i] == 0.0f ? 0.0f :", "weights[i] =", _CPU_MERGE),
    Mutation("merge-cpu-no-dlse", "csrc/merge_attention/*",
             "(dots[i] - mean + dlse)", "(dots[i] - mean)", _CPU_MERGE),
    Mutation("merge-cpu-lse", "csrc/merge_attention/*", "top + std::log(total)", "top", _CPU_MERGE),
    Mutation("merge-cpu-lse-less-its-maximum", "csrc/merge_attention/*",
             "return top + std::log(total);", "return std::log(total);", _CPU_MERGE),
    Mutation("merge-cpu-unweighted-gradient", "csrc/merge_attention/*",
             "load(dout + d, tag) * weights[i], tag", "load(dout + d, tag), tag", _CPU_MERGE),
    Mutation("merge-cpu-weights-that-do-not-sum-to-one", "csrc/merge_attention/*",
             "0.0f : weights[i] / total;", "0.0f : weights[i];", _CPU_MERGE),
    Mutation("merge-cpu-last-of-many", "csrc/merge_attention/*",
             "for (int i = 0; i < a.count; ++i) sum +=", "for (int i = 0; i < 2; ++i) sum +=", _CPU_MERGE),
    Mutation("merge-cpu-samples", "csrc/merge_attention/*",
             "body(row / a.T / a.H,", "body(row / a.T % a.B,", _CPU_MERGE),
    Mutation("merge-cpu-heads", "csrc/merge_attention/*",
             "row / a.T % a.H, row", "row / a.T % a.B, row", _CPU_MERGE),
    Mutation("merge-triton-no-maximum", "cogview_kernels/merge_attention/*.py",
             "tl.exp2((lses[i] - safe) * LOG2E)", "tl.exp2(lses[i] * LOG2E)", _TRITON_MERGE),
    Mutation("merge-triton-no-mean", "cogview_kernels/merge_attention/*.py",
             "(dots[i] - mean + dlse)", "(dots[i] + dlse)", _TRITON_MERGE),
    Mutation("merge-triton-no-dlse", "cogview_kernels/merge_attention/*.py",
             "(dots[i] - mean + dlse)", "(dots[i] - mean)", _TRITON_MERGE),
    Mutation("merge-triton-nothing-seen", "cogview_kernels/merge_attention/*.py",
             "safe = tl.where(top == float(\"-inf\"), 0.0, top)", "safe = top", _TRITON_MERGE),
    Mutation("merge-triton-stride-of-heads", "cogview_kernels/merge_attention/*.py",
             "offset(bh % H, strides[1])", "offset(bh % H, strides[2])", _TRITON_MERGE),
    # ---- decode_attention
    Mutation("decode-cpu-bias", "csrc/decode_attention/*_cpu.cpp",
             "logits[j] += a.layout.pivot_bias;", "logits[j] += a.layout.pivot_bias * a.scale;",
             _CPU_DECODE),
    Mutation("decode-cpu-window", "csrc/common/regions.h",
             "/ block_size - window_blocks + 1;", "/ block_size - window_blocks + 2;",
             _CPU_DECODE),
    Mutation("decode-cpu-no-rescale", "csrc/decode_attention/*_cpu.cpp",
             "store(out + d, load(out + d) * rescale)", "store(out + d, load(out + d))", _CPU_DECODE),
    Mutation("decode-cpu-last-key", "csrc/decode_attention/*_cpu.cpp",
             "window_start[r], position[r], true)", "window_start[r], position[r] - 1, true)", _CPU_DECODE),
    Mutation("decode-cpu-padding-is-a-pivot", "csrc/decode_attention/*_cpu.cpp",
             "at >= origin &&", "at >= 0 &&", _CPU_STARTS),
    Mutation("decode-triton-padding-is-a-pivot", "cogview_kernels/decode_attention/*.py",
             "(at >= origin)", "(at >= 0)", _TRITON_STARTS),
    Mutation("decode-cuda-padding-is-a-pivot", "csrc/decode_attention/*.cuh",
             "at[n] < origin ||", "at[n] < 0 ||", _CUDA_STARTS),
    Mutation("decode-cpu-blocks-from-0", "csrc/decode_attention/*_cpu.cpp",
             "window_start[r] = a.layout.window_start(std::max(0, position[r]), origin);",
             "window_start[r] = a.layout.window_start(std::max(0, position[r]), 0);", _CPU_STARTS),
    Mutation("decode-cuda-blocks-from-0", "csrc/decode_attention/*.cuh",
             "window_start[r] = a.layout.window_start(max(0, position[r]), origin);",
             "window_start[r] = a.layout.window_start(max(0, position[r]), 0);", _CUDA_STARTS),
    Mutation("decode-cpu-merge", "csrc/decode_attention/*_cpu.cpp",
             "exp(broadcast(part[0] - row_max))[0]", "1.0f",
             _CPU_DECODE),
    Mutation("decode-triton-no-rescale", "cogview_kernels/decode_attention/*.py",
             "total = total * shrink + p\n", "total = total + p\n", _TRITON_DECODE),
    Mutation("decode-triton-merge", "cogview_kernels/decode_attention/*.py",
             "part * weight[:, :, None]", "part", _TRITON_DECODE),
    Mutation("decode-triton-counter", "cogview_kernels/decode_attention/*.py",
             "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, 1)",
             "decode_attention_triton test_counters_return_to_zero"),
    Mutation("decode-triton-scaled-peak", "cogview_kernels/decode_attention/*.py",
             "tl.exp2((x - new_max[:, None]) * factor)", "tl.exp2(x * factor - new_max[:, None] * factor)",
             "decode_attention_triton test_largest_float16"),
    Mutation("decode-triton-latest", "cogview_kernels/decode_attention/*.py",
             "(at < latest_start)", "(at <= latest_start)",
             _TRITON_DECODE),
    Mutation("decode-triton-last-key", "cogview_kernels/decode_attention/*.py",
             "at[None, :] <= position[:, None]", "at[None, :] < position[:, None]", _TRITON_DECODE),
    Mutation("decode-cuda-no-rescale", "csrc/decode_attention/*.cuh",
             "sum[r][i] * old + p", "sum[r][i] + p", _CUDA_DECODE),
    Mutation("decode-cuda-merge", "csrc/decode_attention/*.cuh",
             "__ldcg(partial + s * (D + 2) + 2 + d) * power(__ldcg(partial + s * (D + 2)) - base)",
             "__ldcg(partial + s * (D + 2) + 2 + d)",
             _CUDA_DECODE),
    Mutation("decode-cuda-counter", "csrc/decode_attention/*.cuh",
             "if (is_last) *counter = 0;", "", _CUDA_DECODE),
    # ---- layer_norm and sandwich_layer_norm, CPU
    Mutation("norm-cpu-mean-correction", "csrc/norms/values.h",
             "mean = first + correction;", "mean = first;", _CPU_NORM),
    Mutation("norm-cpu-eps", "csrc/norms/values.h", "eps * relaxed * relaxed", "eps", _CPU_NORM),
    Mutation("norm-cpu-rstd-of-low-precision", "csrc/norms/values.h",
             "1.0f / __builtin_sqrtf(variance)", "1.000001f / __builtin_sqrtf(variance)", _CPU_NORM),
    Mutation("norm-cpu-last-partial", "csrc/norms/row.h",
             "for (int64_t i = 0; i < chunks; ++i) sum +=", "for (int64_t i = 0; i + 1 < chunks; ++i) sum +=",
             _CPU_NORM),
    Mutation("norm-cpu-no-hat", "csrc/norms/row.h", "t.sum[1] += g * xhat;", "", _CPU_NORM),
    Mutation("norm-cpu-bf16-dweight", "csrc/norms/row.h",
             "load(dweight + j, tag) + dy * xhat", "round_to_bfloat16(load(dweight + j, tag) + dy * xhat)",
             _CPU_NORM),
    Mutation("norm-cpu-maximum-of-the-last-row", "csrc/norms/row.h",
             "abs_max = own > abs_max ? own : abs_max;", "abs_max = own;", _CPU_NORM),
    Mutation("sandwich-cpu-keep-scale", "csrc/norms/row.h",
             "? x * dropout.keep_scale : VecF{}", "? x : VecF{}", _CPU_SANDWICH),
    Mutation("sandwich-cpu-unrounded-residual", "csrc/norms/values.h",
             "rounded<T>(f(j, load(x + j, tag), load(other + j, tag), tag))",
             "f(j, load(x + j, tag), load(other + j, tag), tag)", "sandwich_layer_norm test_the_second_norm"),
    Mutation("sandwich-cpu-words-apart", "csrc/norms/values.h",
             "count(j + kLanes, bitcast<VecF>(words & 0xffff0000), Whole{}, odd);",
             "count(j + kLanes, bitcast<VecF>(words << 16), Whole{}, odd);", _CPU_SANDWICH),
    Mutation("norm-cpu-order-of-weights", "csrc/norms/values.h",
             "store(row + j, x.even);\n        store(row + j + kLanes, x.odd);",
             "store(row + j, x.odd);\n        store(row + j + kLanes, x.even);", _CPU_NORM),
    Mutation("norm-cpu-last-values", "csrc/norms/values.h",
             "step(j, load(x + j, part), part, d);", "", _CPU_NORM),
    Mutation("norm-cpu-scaled-rows", "csrc/norms/values.h",
             "kScaled ? v * scale : v, s, affine", "v, s, affine", _CPU_NORM),
    Mutation("sandwich-cpu-direct-gradient", "csrc/norms/sandwich_cpu.h",
             "if (dresidual_out != nullptr) d += load(dresidual_out + at + j, tag);", "", _CPU_SANDWICH),
    Mutation("sandwich-cpu-rounds-to-normed", "csrc/norms/sandwich_cpu.h",
             "normalise_values<kW, kKind, kScaled, T>", "normalise_values<kW, kKind, kScaled, N>",
             f"{_NARROW_NORMED} and cpu"),
    Mutation("sandwich-triton-rounds-to-normed", "cogview_kernels/_norms/sandwich_triton.py",
             "pre_bias, C, columns, ROUND, dtype)",
             "pre_bias, C, columns, ROUND, normed_ptr.dtype.element_ty)",
             f"{_NARROW_NORMED} and triton"),
    Mutation("sandwich-cuda-rounds-to-normed", "csrc/norms/sandwich.cuh",
             "affine<kKind, T>(out, pre_weight", "affine<kKind, N>(out, pre_weight",
             f"{_NARROW_NORMED} and cuda"),
    Mutation("dtype-in-no-signature", "csrc/python_tensor.h",
             "put('D', &x, sizeof(x));", "put('D', &type, sizeof(type));", "signature test_a_dtype"),
    # ---- layer_norm and sandwich_layer_norm, Triton and CUDA
    Mutation("norm-triton-mean-correction", "cogview_kernels/**/*.py",
             "    rest = rest / C\n", "    rest = rest * 0.0\n", _TRITON_NORM),
    Mutation("norm-triton-no-plain", "cogview_kernels/**/*.py",
             "rstd * (g[i] - plain - xhat[i] * hat)", "rstd * (g[i] - xhat[i] * hat)", _TRITON_NORM),
    Mutation("norm-triton-eps", "cogview_kernels/**/*.py", "eps * relaxed * relaxed", "eps", _TRITON_NORM),
    Mutation("norm-triton-last-partial", "cogview_kernels/**/*.py",
             "for start in range(0, P, BLOCK_P):\n        p = start", 
             "for start in range(0, P, BLOCK_P):\n        p = 1 + start", _TRITON_NORM),
    Mutation("sandwich-triton-dropout-of-the-gradient", "cogview_kernels/_norms/*.py",
             "dx = drop(dx, row, columns, seed, keep_threshold, keep_scale)", "dx = dx", _TRITON_SANDWICH),
    Mutation("norm-cuda-mean-correction", "csrc/*/*.cuh",
             "const float correction = sums.x * inverse;", "const float correction = 0.0f;", _CUDA_NORM),
    Mutation("sandwich-cuda-keep-scale", "csrc/*/*.cuh",
             "? x.of[i] * dropout.keep_scale", "? x.of[i]", _CUDA_SANDWICH),
    Mutation("sandwich-cuda-direct-gradient", "csrc/norms/sandwich.cuh",
             "trunk.of[i] += direct.of[i];", "trunk.of[i] += 0.0f;", _CUDA_SANDWICH),
    # ---- rms_norm and sandwich_rms_norm: what they do not share with LayerNorm
    Mutation("rms-cpu-sum-for-squares", "csrc/norms/row.h",
             "kKind == NormKind::kLayer ? v : v * v", "v", _CPU_RMS),
    Mutation("rms-cpu-rounded-to-float", "csrc/norms/row.h",
             "affine.round_before_weight ? rounded<T>(y) : y", "y", _CPU_RMS),
    Mutation("rms-cpu-no-hat", "csrc/norms/row.h",
             ": g - xhat * means.hat);", ": g);", _CPU_RMS),
    Mutation("rms-cpu-offset-of-the-gradient", "csrc/norms/single_cpu.h",
             "widen_parameter(a.weight, C, 1.0f, a.weight_offset,",
             "widen_parameter(a.weight, C, 1.0f, 0.0f,", _CPU_RMS),
    Mutation("rms-cpu-second-norms-statistics", "csrc/norms/norm.h",
             "return {0.0f, stats[norm * rows + r]};", "return {0.0f, stats[r]};", _CPU_SANDWICH_RMS),
    Mutation("rms-cpu-slots-of-gradients", "csrc/norms/sandwich_cpu.h",
             "to[kNorm == 2 ? slot : 2 * slot]", "to[slot]", _CPU_SANDWICH_RMS),
    Mutation("rms-cpu-offset-of-the-second-gradient", "csrc/norms/sandwich_cpu.h",
             "widen_parameter(a.pre_weight, C, 1.0f, a.weight_offset,",
             "widen_parameter(a.pre_weight, C, 1.0f, 0.0f,", _CPU_SANDWICH_RMS),
    Mutation("rms-triton-no-hat", "cogview_kernels/_norms/*.py",
             "dx += (rstd * (g[i] - xhat[i] * hat),)", "dx += (rstd * g[i],)", _TRITON_RMS),
    Mutation("rms-triton-rounding", "cogview_kernels/_norms/*.py",
             "x = round_row(x, C, columns, dtype)", "x = x", _TRITON_RMS),
    Mutation("rms-triton-offset", "cogview_kernels/_norms/*.py",
             "x = add_rows(x, fill_row(added, columns))", "x = x", _TRITON_RMS),
    Mutation("rms-triton-relaxed", "cogview_kernels/_norms/*.py",
             "scale, _ = _powers_of_two(abs_max)\n        relaxed = abs_max * scale * 0.125",
             "scale, _ = _powers_of_two(abs_max)\n        relaxed = 1.0", 
             "rms_norm (test_extreme_rows or test_float32) and triton"),
    Mutation("rms-triton-second-norms-statistics", "cogview_kernels/_norms/*.py",
             "rstd = tl.load(stats_ptr + offset(R, norm) + row)", "rstd = tl.load(stats_ptr + row)",
             _TRITON_SANDWICH_RMS),
    Mutation("rms-cuda-no-hat", "csrc/norms/block.cuh",
             "s.rstd * (g.of[i] - xhat.of[i] * (sums.y * inverse))", "s.rstd * g.of[i]", _CUDA_RMS),
    Mutation("rms-cuda-rounding", "csrc/norms/block.cuh",
             "x = rounded<T>(x);", "x = x;", _CUDA_RMS),
    Mutation("rms-cuda-offset", "csrc/norms/block.cuh", "x.of[i] += offset;", "x.of[i] += 0.0f;", _CUDA_RMS),
    Mutation("rms-cuda-slots-of-gradients", "csrc/norms/sandwich.cuh",
             "store_partial(partial + kNorm * C, dpre_weight, C);", "store_partial(partial, dpre_weight, C);",
             _CUDA_SANDWICH_RMS),
    # ---- stable_softmax
    Mutation("softmax-cpu-causal", "csrc/stable_softmax/*_cpu.cpp",
             "std::min(a.N, t + 1)", "std::min(a.N, t + 2)", _CPU_SOFTMAX),
    Mutation("softmax-cpu-tail-of-the-dot", "csrc/stable_softmax/*_cpu.cpp",
             "for (; j < a.N; ++j) dot += to_float(dprobs[j]) * to_float(probs[j]);", "", _CPU_SOFTMAX),
    Mutation("softmax-cpu-one-running-sum", "csrc/stable_softmax/*_cpu.cpp",
             "constexpr int64_t kSumBlock = 16 * kLanes;", "constexpr int64_t kSumBlock = 1 << 30;",
             _CPU_SOFTMAX),
    Mutation("softmax-triton-no-rescale", "cogview_kernels/stable_softmax/*.py",
             "rest_total * tl.exp2((rest_max - safe) * factor) +", "rest_total +", _TRITON_SOFTMAX),
    Mutation("softmax-triton-last-tile-alone", "cogview_kernels/stable_softmax/*.py",
             "products += p_rest * dp_rest", "products = p_rest * dp_rest", _TRITON_SOFTMAX),
    Mutation("softmax-triton-bound-of-the-diagonal", "cogview_kernels/stable_softmax/*.py",
             "cols[None, :] <= last_key[:, None]", "cols[None, :] < bound[:, None]", _TRITON_SOFTMAX),
    Mutation("softmax-triton-scalar-loads", "cogview_kernels/stable_softmax/*.py",
             "rows % T // 16 * 16 + 16", "rows % T + 1", "stable_softmax sixteen_bytes"),
    Mutation("softmax-cuda-merge", "csrc/stable_softmax/*.cuh",
             "a.sum * exp2f(factor * (a.row_max - row_max))", "a.sum", _CUDA_SOFTMAX),
    # ---- linear_cross_entropy
    Mutation("xent-cpu-no-rescale", "csrc/linear_cross_entropy/*_cpu.cpp",
             "load(part.total + j) * exp_negative(before - safe)", "load(part.total + j)", _CPU_XENT),
    Mutation("xent-cpu-target", "csrc/linear_cross_entropy/*_cpu.cpp",
             "with(off + factors.at_target.data[j])", "with(off)", _CPU_XENT),
    Mutation("xent-cpu-last-part", "csrc/linear_cross_entropy/*_cpu.cpp",
             "for (int64_t p = 0; p < count; ++p) {\n            // Kahan",
             "for (int64_t p = 0; p + 1 < count; ++p) {\n            // Kahan", _CPU_XENT),
    Mutation("xent-cpu-ids-before-the-piece", "csrc/linear_cross_entropy/*_cpu.cpp",
             "known = a.logits.first > 0;", "known = 0;", _CPU_XENT),
    Mutation("xent-cpu-slope-of-the-cap", "csrc/linear_cross_entropy/*_cpu.cpp",
             "return g * (1.0f - t * t);", "return g;", _CPU_XENT_OPTIONS),
    Mutation("xent-cpu-smoothing-in-another-piece", "csrc/linear_cross_entropy/*_cpu.cpp",
             "float(ids[p + 1] - ids[p]) * shift", "0.0f * shift", _CPU_XENT_OPTIONS),
    Mutation("xent-cpu-target-missing-in-dbias", "csrc/linear_cross_entropy/*_cpu.cpp",
             "reduce_sum(row_sum) + dbias[r - begin]", "reduce_sum(row_sum)", _CPU_XENT_OPTIONS),
    Mutation("xent-cpu-last-of-equal-logits", "csrc/linear_cross_entropy/*_cpu.cpp",
             "for (int64_t r = rows; r-- > 0;)", "for (int64_t r = 0; r < rows; ++r)",
             "linear_cross_entropy test_predicted_tokens and cpu"),
    Mutation("product-not-added", "csrc/linear_cross_entropy/product_cpu.cpp",
             "columns, out, p.out_m, p.add", "columns, out, p.out_m, false", _CPU_PRODUCT),
    Mutation("product-not-added-to-bfloat16", "csrc/linear_cross_entropy/product_cpu.cpp",
             "add ? load(out + n, tag) + sum : sum", "sum", _CPU_PRODUCT),
    Mutation("product-panels-without-padding", "csrc/linear_cross_entropy/product_cpu.cpp",
             "b.data + panel * units * width;", "b.data + panel * p.K * width;", _CPU_PRODUCT),
    Mutation("product-half-a-pair", "csrc/common/panels.h",
             "K % kPack != 0 || stride % kPack != 0", "false", _CPU_PRODUCT),
    Mutation("product-rows-that-lie-apart", "csrc/linear_cross_entropy/product_cpu.cpp",
             "columns, p.add, out + m * p.out_m", "columns, p.add, out + m * p.N", _CPU_PRODUCT),
    Mutation("product-last-part", "csrc/linear_cross_entropy/product_cpu.cpp",
             "(part + 1) * blocks / parts", "(part + 1) * (blocks / parts)", _CPU_PRODUCT),
    Mutation("product-rows-of-the-first-slab", "csrc/linear_cross_entropy/product_cpu.cpp",
             "u, first + m, real, count, to", "u, first, real, count, to", _CPU_PRODUCT),
    Mutation("product-byte-forgotten", "csrc/linear_cross_entropy/product_cpu.cpp",
             "upper << 16 | below << 8", "upper << 16", _CPU_SUM),
    Mutation("product-byte-not-rounded", "csrc/linear_cross_entropy/product_cpu.cpp",
             "bitcast<VecU>(sum) + 0x80", "bitcast<VecU>(sum)", _CPU_SUM),
    Mutation("product-sum-of-what-was-there", "csrc/linear_cross_entropy/product_cpu.cpp",
             "if (add) {\n            const VecU upper", "{\n            const VecU upper", _CPU_SUM),
    Mutation("product-sum-cut-off", "csrc/linear_cross_entropy/product_cpu.cpp",
             "if (last) return store", "if (false) return store", _CPU_SUM),
    Mutation("product-bytes-of-the-first-rows", "csrc/linear_cross_entropy/product_cpu.cpp",
             "p.low + begin * p.N + first", "p.low + first", _CPU_SUM),
    Mutation("xent-24-bits-never-rounded", "cogview_kernels/linear_cross_entropy/*.py",
             "last=tokens.stop == N", "last=False", "linear_cross_entropy summed_in_24"),
    Mutation("xent-first-tokens-forgotten", "cogview_kernels/linear_cross_entropy/*.py",
             "first=False, last=", "first=tokens.start == C, last=", "linear_cross_entropy summed_in_24"),
    Mutation("xent-24-bits-in-more-memory", "cogview_kernels/linear_cross_entropy/*.py",
             "problem.room - V * C // 2", "problem.room",
             "linear_cross_entropy (room_for_24 or quarter_of_their)"),
    Mutation("xent-a-token-missing-in-dweight", "cogview_kernels/linear_cross_entropy/*.py",
             "product(dlogits, hidden, out", "product(dlogits[:, 1:], hidden[1:], out", _CHUNKED_XENT),
    Mutation("xent-scale-twice", "cogview_kernels/linear_cross_entropy/*.py",
             "coefficient=part.coefficient * factor", "coefficient=part.coefficient * factor * 2",
             _CHUNKED_XENT),
    Mutation("xent-used-up-rows-are-read", "cogview_kernels/linear_cross_entropy/*.py",
             "last if ids.start < used_up else earlier", "earlier", "linear_cross_entropy kept_in_a_buffer"),
    Mutation("xent-chunks-of-16-bits-are-summed", "cogview_kernels/linear_cross_entropy/*.py",
             "if room >= V * N:", "if False:", "linear_cross_entropy fit_in_one_chunk"),
    Mutation("xent-gradient-of-z-loss", "cogview_kernels/linear_cross_entropy/*.py",
             "(1 + 2 * objective.z_loss *", "(1 + objective.z_loss *",
             "linear_cross_entropy test_options and chunked"),
    Mutation("xent-z-loss-past-float16", "cogview_kernels/linear_cross_entropy/*.py",
             ".clamp(max=most) - excess", ".clamp(max=most)", "linear_cross_entropy large_z_loss"),
    Mutation("xent-frozen-weight-has-a-gradient", "cogview_kernels/linear_cross_entropy/*.py",
             "summed and dweight, summed", "summed, summed", "linear_cross_entropy frozen_takes_no"),
    Mutation("xent-triton-no-rescale", "cogview_kernels/linear_cross_entropy/*.py",
             "total = total * tl.exp2((logit_max - safe) * LOG2E) +", "total = total +", _TRITON_XENT),
    Mutation("xent-triton-merge", "cogview_kernels/linear_cross_entropy/*.py",
             "tl.sum(totals * tl.exp2((maxima - safe[None, :]) * LOG2E), axis=0)", "tl.sum(totals, axis=0)",
             _TRITON_XENT),
    Mutation("xent-triton-ids-before-the-piece", "cogview_kernels/linear_cross_entropy/*.py",
             "total += known_total *", "total += 0.0 *", _TRITON_XENT),
    Mutation("xent-triton-target", "cogview_kernels/linear_cross_entropy/*.py",
             "p - at_target[None, :], p)", "p, p)", _TRITON_XENT),
    Mutation("xent-triton-slope-of-the-cap", "cogview_kernels/linear_cross_entropy/*.py",
             "g *= 1.0 - t * t", "g *= 1.0", _TRITON_XENT_OPTIONS),
    Mutation("xent-triton-smoothing", "cogview_kernels/linear_cross_entropy/*.py",
             "p -= (coefficient * id_share)[None, :]", "p -= 0.0", _TRITON_XENT_OPTIONS),
]  # fmt: skip


def find(mutation: Mutation, root: Path) -> Path | None:
    """The file of ``root`` that has the text."""
    found = [p for p in sorted(root.glob(mutation.where)) if mutation.before in p.read_text()]
    return found[0].relative_to(root) if len(found) == 1 else None


def copy_tree() -> None:
    """Brings the copy up to date; unchanged files keep their times, so that little is compiled again."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {line for line in listed.stdout.splitlines() if (ROOT / line).is_file()}
    for path in COPY.rglob("*"):
        name = str(path.relative_to(COPY))
        if path.is_file() and not name.startswith("build/") and path.suffix != ".so" and name not in wanted:
            path.unlink()
    for name in wanted:
        target = COPY / name
        if not target.exists() or not filecmp.cmp(ROOT / name, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COGVIEW_CUDA": "0", "PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=COPY, env=environment, capture_output=True, text=True
    )


def build() -> None:
    done = run("setup.py", "-q", "build_ext", "--inplace")
    if done.returncode != 0:
        sys.exit(f"does not compile:\n{(done.stdout + done.stderr)[-3000:]}")


def fails(tests: str) -> bool:
    """Whether one of the tests does; without any test that is an error."""
    file, words = tests.split(" ", 1)
    folder, _, name = file.rpartition("/")
    done = run(
        *("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"),
        *(f"tests/{folder or 'kernels'}/test_{name}.py", "-k", words),
    )
    if done.returncode in (2, 3, 4, 5):  # pytest's own; a kernel that crashes ends it by a signal
        sys.exit(f"pytest {tests}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutations whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--trust", action="store_true", help="do not run the tests unbroken first")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.words or any(w in m.name for w in options.words)]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return
    copy_tree()
    build()
    if not options.trust:
        for tests in dict.fromkeys(m.tests for m in chosen):
            if fails(tests):
                sys.exit(f"fails without a mutation: {tests}")
    wrong = 0
    for mutation in chosen:
        began = time.monotonic()
        path = find(mutation, COPY)
        if path is None:
            verdict = "STALE: its text is not in one file"
        else:
            text = (COPY / path).read_text()
            (COPY / path).write_text(text.replace(mutation.before, mutation.after))
            if path.suffix != ".cuh" and path.parts[0] == "csrc":
                build()
            verdict = "caught" if fails(mutation.tests) else "MISSED"
            (COPY / path).write_text(text)
        wrong += verdict != "caught"
        print(f"{mutation.name:45} {verdict:8} {time.monotonic() - began:5.0f} s", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} caught")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
