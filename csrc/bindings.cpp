// SPDX-License-Identifier: Apache-2.0
// The only file that knows Python. Tensors cross as addresses, sizes and strides (in elements), so the
// extension depends on no PyTorch version; cogview_kernels/<op>/autograd.py checks and allocates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "decode_attention/decode_attention.h"
#include "layer_norm/layer_norm.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "sandwich_layer_norm/sandwich_layer_norm.h"
#include "stable_softmax/stable_softmax.h"
#include "three_region_attention/three_region_attention.h"
#include "three_region_attention/three_region_attention_cuda.h"

namespace py = pybind11;
using namespace cogview;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Where a weight, a bias or its gradient lies (0 for none) and its dtype.
using ParameterAddress = std::pair<Address, int>;

Parameter parameter(ParameterAddress p) {
    return {pointer<void>(p.first), DType(p.second)};
}

// Threshold, scale, seed, and where the seed lies if on the device (else 0).
using DropoutArguments = std::tuple<uint32_t, float, uint64_t, Address>;

Dropout dropout(DropoutArguments d) {
    return {std::get<0>(d), std::get<1>(d), std::get<2>(d), pointer<uint64_t>(std::get<3>(d))};
}

// Rows, C, dtype.
using RowShapeArguments = std::tuple<int64_t, int64_t, int>;

RowShape row_shape(RowShapeArguments x) {
    return {std::get<0>(x), std::get<1>(x), DType(std::get<2>(x))};
}

// eps, mode of PB-Relax.
using NormArguments = std::pair<float, int>;

NormOptions norm_options(NormArguments x) {
    return {x.first, PbRelax(x.second)};
}

// Where the workspace of CUDA's persistent blocks lies, and their number; (0, 0) for the CPU.
using WorkspaceArguments = std::pair<Address, int64_t>;

BlockWorkspace block_workspace(WorkspaceArguments x) {
    return {pointer<float>(x.first), x.second};
}

LayerNormForward layer_norm_forward(Address x, Address y, ParameterAddress weight, ParameterAddress bias,
                                    Address stats, RowShapeArguments shape, NormArguments options,
                                    WorkspaceArguments workspace) {
    return {pointer<void>(x),          pointer<void>(y), {parameter(weight), parameter(bias)},
            pointer<float>(stats),     row_shape(shape), norm_options(options),
            block_workspace(workspace)};
}

LayerNormBackward layer_norm_backward(Address dy, Address x, Address dx, ParameterAddress weight,
                                      ParameterAddress dweight, ParameterAddress dbias, Address stats,
                                      RowShapeArguments shape, WorkspaceArguments workspace) {
    return {pointer<void>(dy),
            pointer<void>(x),
            pointer<void>(dx),
            parameter(weight),
            {parameter(dweight), parameter(dbias)},
            pointer<float>(stats),
            row_shape(shape),
            block_workspace(workspace)};
}

// The parameters are those of the post norm, then of the pre norm: weight, bias, weight, bias.
SandwichForward sandwich_forward(Address branch, Address residual, Address residual_out, Address normed,
                                 std::array<ParameterAddress, 4> parameters, Address stats,
                                 RowShapeArguments shape, NormArguments options, DropoutArguments drop,
                                 WorkspaceArguments workspace) {
    return {pointer<void>(branch),
            pointer<void>(residual),
            pointer<void>(residual_out),
            pointer<void>(normed),
            {parameter(parameters[0]), parameter(parameters[1])},
            {parameter(parameters[2]), parameter(parameters[3])},
            pointer<float>(stats),
            row_shape(shape),
            norm_options(options),
            dropout(drop),
            block_workspace(workspace)};
}

SandwichBackward sandwich_backward(Address dresidual_out, Address dnormed, Address branch,
                                   Address residual_out, Address dbranch, Address dresidual,
                                   std::array<ParameterAddress, 2> weights,
                                   std::array<ParameterAddress, 4> gradients, Address stats,
                                   RowShapeArguments shape, DropoutArguments drop,
                                   WorkspaceArguments workspace) {
    return {pointer<void>(dresidual_out),
            pointer<void>(dnormed),
            pointer<void>(branch),
            pointer<void>(residual_out),
            pointer<void>(dbranch),
            pointer<void>(dresidual),
            parameter(weights[0]),
            parameter(weights[1]),
            {parameter(gradients[0]), parameter(gradients[1])},
            {parameter(gradients[2]), parameter(gradients[3])},
            pointer<float>(stats),
            row_shape(shape),
            dropout(drop),
            block_workspace(workspace)};
}

SoftmaxForward softmax_forward(Address scores, Address mask, Address probs, std::array<int64_t, 4> shape,
                               std::array<int64_t, 4> scores_stride, std::array<int64_t, 4> mask_stride,
                               float alpha, float scale, bool causal, int dtype) {
    return {pointer<void>(scores),
            pointer<uint8_t>(mask),
            pointer<void>(probs),
            shape[0],
            shape[1],
            shape[2],
            shape[3],
            {scores_stride[0], scores_stride[1], scores_stride[2]},
            {mask_stride[0], mask_stride[1], mask_stride[2], mask_stride[3]},
            alpha,
            scale,
            causal,
            DType(dtype)};
}

SoftmaxBackward softmax_backward(Address dprobs, Address probs, Address dscores, int64_t rows, int64_t N,
                                 float factor, int dtype) {
    return {pointer<void>(dprobs), pointer<void>(probs), pointer<void>(dscores), rows, N, factor,
            DType(dtype)};
}

// Where logits lie, the stride of a row, ids, tokens, dtype.
using LogitsArguments = std::tuple<Address, int64_t, int64_t, int64_t, int>;

Logits cross_entropy_logits(LogitsArguments x) {
    return {pointer<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x),
            DType(std::get<4>(x))};
}

LinearCrossEntropyReduce cross_entropy_reduce(LogitsArguments logits, Address logit_max, Address total) {
    return {cross_entropy_logits(logits), pointer<float>(logit_max), pointer<float>(total)};
}

LinearCrossEntropyGradient cross_entropy_gradient(LogitsArguments logits, int64_t first, Address target,
                                                  Address coefficient, Address logit_max, Address total) {
    return {cross_entropy_logits(logits), first,
            pointer<int64_t>(target),     pointer<float>(coefficient),
            pointer<float>(logit_max),    pointer<float>(total)};
}

// Tensors of attention come as (address, strides of the first three dimensions).
using Strided = std::pair<Address, std::array<int64_t, 3>>;

AttentionInput attention_input(const Strided& x) {
    return {pointer<void>(x.first), {x.second[0], x.second[1], x.second[2]}};
}

AttentionOutput attention_output(const Strided& x) {
    return {pointer<void>(x.first), {x.second[0], x.second[1], x.second[2]}};
}

// shape: B, H, Hkv, T, D, P, block size, window blocks.
AttentionShape attention_shape(std::array<int64_t, 8> shape, Address pivots, float bias, float scale,
                               float dropout_p, uint32_t drop_below, uint64_t seed, int dtype) {
    return {shape[0],  shape[1],   shape[2], shape[3],     shape[4],
            shape[5],  shape[6],   shape[7], bias,         scale,
            dropout_p, drop_below, seed,     DType(dtype), pointer<int64_t>(pivots)};
}

// `name` of the arguments that `make` takes and a number of threads. `pick` names the function for the
// instruction set at each call.
template <typename Args, typename... Arguments, typename Pick>
void bind_cpu(py::module_& m, const char* name, Args (*make)(Arguments...), Pick pick) {
    m.def(
        name, [=](Arguments... arguments, int threads) { pick()(make(arguments...), threads); },
        py::call_guard<py::gil_scoped_release>());
}

// `name` of the arguments that `make` takes and a cudaStream_t.
template <typename Args, typename... Arguments>
void bind_cuda(py::module_& m, const char* name, Args (*make)(Arguments...),
               void (*run)(const Args&, void*)) {
    m.def(name,
          [=](Arguments... arguments, Address stream) { run(make(arguments...), pointer<void>(stream)); });
}

// shape: B, H, Hkv, Tq, S, D, P, block size (0: no layout), window blocks, keys of a block, blocks of a row.
DecodeAttention decode_attention_arguments(Strided q, Strided k, Strided v, Strided out,
                                           std::array<int, 11> shape, float bias, float scale,
                                           std::pair<Address, int> lengths, std::pair<Address, int> pivots,
                                           Address partial, int dtype) {
    DecodeAttention a = {};
    a.B = shape[0], a.H = shape[1], a.Hkv = shape[2], a.Tq = shape[3], a.S = shape[4], a.D = shape[5];
    a.P = shape[6], a.w = shape[7], a.W = shape[8], a.chunk = shape[9], a.splits = shape[10];
    a.bias = bias;
    a.scale = scale;
    a.q = pointer<void>(q.first);
    a.k = pointer<void>(k.first);
    a.v = pointer<void>(v.first);
    a.out = pointer<void>(out.first);
    std::copy(q.second.begin(), q.second.end(), a.q_stride);
    std::copy(k.second.begin(), k.second.end(), a.k_stride);
    std::copy(v.second.begin(), v.second.end(), a.v_stride);
    std::copy(out.second.begin(), out.second.end(), a.out_stride);
    a.lengths = pointer<void>(lengths.first);
    a.length_bytes = lengths.second;
    a.pivots = pointer<void>(pivots.first);
    a.pivot_bytes = pivots.second;
    a.partial = pointer<float>(partial);
    a.dtype = DType(dtype);
    return a;
}

#if COGVIEW_HAS_CUDA
// What both directions take; the tuples keep the signatures short. dropout: drop_below, 1 / (1 - p), seed,
// and the address of a seed on the device (0: none).
using AttentionDropout = std::tuple<uint32_t, float, uint64_t, Address>;

CudaAttention cuda_attention(std::array<int, 8> shape, float bias, float scale,
                             const AttentionDropout& dropout, std::pair<Address, int> pivots, Address sorted,
                             const Strided& q, const Strided& k, const Strided& v) {
    CudaAttention a = {};
    a.B = shape[0], a.H = shape[1], a.Hkv = shape[2], a.T = shape[3];
    a.D = shape[4], a.P = shape[5], a.w = shape[6], a.W = shape[7];
    a.bias = bias;
    a.scale = scale;
    a.drop_below = std::get<0>(dropout);
    a.keep_scale = std::get<1>(dropout);
    a.seed = std::get<2>(dropout);
    a.seed_data = pointer<int64_t>(std::get<3>(dropout));
    a.pivots = pointer<void>(pivots.first);
    a.pivot_bytes = pivots.second;
    a.sorted = pointer<int32_t>(sorted);
    a.q = attention_input(q);
    a.k = attention_input(k);
    a.v = attention_input(v);
    return a;
}

CudaAttentionForward attention_forward_cuda(Strided q, Strided k, Strided v, Strided out, Address lse,
                                            std::array<int, 8> shape, float bias, float scale,
                                            AttentionDropout dropout, std::pair<Address, int> pivots,
                                            Address sorted) {
    return {cuda_attention(shape, bias, scale, dropout, pivots, sorted, q, k, v), attention_output(out),
            pointer<float>(lse)};
}

CudaAttentionBackward attention_backward_cuda(Strided q, Strided k, Strided v, Strided out, Strided dout,
                                              Address lse, Address dlse, Strided dq, Strided dk, Strided dv,
                                              Address delta, Address dk_far, Address dv_far,
                                              std::array<int, 8> shape, float bias, float scale,
                                              AttentionDropout dropout, std::pair<Address, int> pivots,
                                              Address sorted) {
    return {cuda_attention(shape, bias, scale, dropout, pivots, sorted, q, k, v),
            attention_input(out),
            attention_input(dout),
            pointer<float>(lse),
            pointer<float>(dlse),
            attention_output(dq),
            attention_output(dk),
            attention_output(dv),
            pointer<float>(delta),
            pointer<float>(dk_far),
            pointer<float>(dv_far)};
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of cogview_kernels; called by cogview_kernels/<op>/autograd.py.";
    m.attr("has_cuda") = bool(COGVIEW_HAS_CUDA);
    m.def("isa", &isa_name);
    m.def("set_isa", &set_isa);
    m.def("parallel_runtime", &parallel_runtime);
    m.def("free_workspaces", &free_workspaces);

    bind_cpu(m, "stable_softmax_fwd_cpu", softmax_forward,
             [] { return COGVIEW_PICK_ISA(stable_softmax_fwd_cpu); });
    bind_cpu(m, "stable_softmax_bwd_cpu", softmax_backward,
             [] { return COGVIEW_PICK_ISA(stable_softmax_bwd_cpu); });
    bind_cpu(m, "layer_norm_fwd_cpu", layer_norm_forward,
             [] { return COGVIEW_PICK_ISA(layer_norm_fwd_cpu); });
    bind_cpu(m, "layer_norm_bwd_cpu", layer_norm_backward,
             [] { return COGVIEW_PICK_ISA(layer_norm_bwd_cpu); });
    bind_cpu(m, "sandwich_layer_norm_fwd_cpu", sandwich_forward,
             [] { return COGVIEW_PICK_ISA(sandwich_layer_norm_fwd_cpu); });
    bind_cpu(m, "sandwich_layer_norm_bwd_cpu", sandwich_backward,
             [] { return COGVIEW_PICK_ISA(sandwich_layer_norm_bwd_cpu); });
    bind_cpu(m, "linear_cross_entropy_reduce_cpu", cross_entropy_reduce,
             [] { return COGVIEW_PICK_ISA(linear_cross_entropy_reduce_cpu); });
    bind_cpu(m, "linear_cross_entropy_gradient_cpu", cross_entropy_gradient,
             [] { return COGVIEW_PICK_ISA(linear_cross_entropy_gradient_cpu); });
    m.def(
        "three_region_attention_fwd_cpu",
        [](Strided q, Strided k, Strided v, Strided out, Address lse, std::array<int64_t, 8> shape,
           Address pivots, float bias, float scale, float dropout_p, uint32_t drop_below, uint64_t seed,
           int dtype, int threads) {
            const AttentionForward args = {
                attention_shape(shape, pivots, bias, scale, dropout_p, drop_below, seed, dtype),
                attention_input(q),
                attention_input(k),
                attention_input(v),
                attention_output(out),
                pointer<float>(lse)};
            COGVIEW_PICK_ISA_WITH_BF16(three_region_attention_fwd_cpu)(args, SortedPivots(args.shape),
                                                                       threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "three_region_attention_bwd_cpu",
        [](Strided q, Strided k, Strided v, Strided out, Strided dout, Address lse, Address dlse, Strided dq,
           Strided dk, Strided dv, std::array<int64_t, 8> shape, Address pivots, float bias, float scale,
           float dropout_p, uint32_t drop_below, uint64_t seed, int dtype, int threads) {
            const AttentionBackward args = {
                attention_shape(shape, pivots, bias, scale, dropout_p, drop_below, seed, dtype),
                attention_input(q),
                attention_input(k),
                attention_input(v),
                attention_input(out),
                attention_input(dout),
                pointer<float>(lse),
                pointer<float>(dlse),
                attention_output(dq),
                attention_output(dk),
                attention_output(dv)};
            COGVIEW_PICK_ISA_WITH_BF16(three_region_attention_bwd_cpu)(args, SortedPivots(args.shape),
                                                                       threads);
        },
        py::call_guard<py::gil_scoped_release>());
    bind_cpu(m, "decode_attention_cpu", decode_attention_arguments,
             [] { return COGVIEW_PICK_ISA(decode_attention_cpu); });
#if COGVIEW_HAS_CUDA
    bind_cuda(m, "stable_softmax_fwd_cuda", softmax_forward, stable_softmax_fwd_cuda);
    bind_cuda(m, "stable_softmax_bwd_cuda", softmax_backward, stable_softmax_bwd_cuda);
    bind_cuda(m, "layer_norm_fwd_cuda", layer_norm_forward, layer_norm_fwd_cuda);
    bind_cuda(m, "layer_norm_bwd_cuda", layer_norm_backward, layer_norm_bwd_cuda);
    bind_cuda(m, "sandwich_layer_norm_fwd_cuda", sandwich_forward, sandwich_layer_norm_fwd_cuda);
    bind_cuda(m, "sandwich_layer_norm_bwd_cuda", sandwich_backward, sandwich_layer_norm_bwd_cuda);
    bind_cuda(m, "three_region_attention_fwd_cuda", attention_forward_cuda, three_region_attention_fwd_cuda);
    bind_cuda(m, "three_region_attention_bwd_cuda", attention_backward_cuda, three_region_attention_bwd_cuda);
    bind_cuda(m, "decode_attention_cuda", decode_attention_arguments, decode_attention_cuda);
#endif
}
