// SPDX-License-Identifier: Apache-2.0
// The only file that knows Python, with python_tensor.h, which reads tensors, so that the extension depends
// on no PyTorch version. Of some tensors the address alone crosses. cogview_kernels/<op>/native.py allocates.
// An object crosses as a tuple of its fields. cogview_kernels/_C.pyi names and types every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/positions.h"
#include "common/workspace.h"
#include "decode_attention/decode_attention.h"
#include "decode_linear/decode_linear.h"
#include "decode_step/decode_step.h"
#include "draw_step/draw_step.h"
#include "draw_tokens/draw_tokens.h"
#include "layer_norm/layer_norm.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "local_attention_2d/local_attention_2d.h"
#include "merge_attention/merge_attention.h"
#include "python_tensor.h"
#include "rms_norm/rms_norm.h"
#include "sandwich_layer_norm/sandwich_layer_norm.h"
#include "sandwich_rms_norm/sandwich_rms_norm.h"
#include "stable_softmax/stable_softmax.h"
#include "three_region_attention/three_region_attention.h"

namespace py = pybind11;
using namespace cogview;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// A weight, a bias or its gradient, or None.
Parameter parameter(const PythonTensor& x) {
    return {x.data, x.dtype};
}

// Threshold, scale, seed, and where the seed lies if on the device (else 0).
using DropoutArguments = std::tuple<uint32_t, float, uint64_t, Address>;

Dropout dropout(DropoutArguments d) {
    return {std::get<0>(d), std::get<1>(d), std::get<2>(d), pointer<uint64_t>(std::get<3>(d))};
}

// Of a tensor [..., C].
RowShape row_shape(const PythonTensor& x) {
    return {x.elements / x.last, x.last, x.dtype};
}

// eps, mode of PB-Relax.
using NormArguments = std::pair<float, int>;

NormOptions norm_options(NormArguments x) {
    return {x.first, PbRelax(x.second), 0.0f, false};
}

// eps, mode of PB-Relax, what is added to weights, whether rows are rounded before they are multiplied.
using RmsArguments = std::tuple<float, int, float, bool>;

NormOptions rms_options(RmsArguments x) {
    return {std::get<0>(x), PbRelax(std::get<1>(x)), std::get<2>(x), std::get<3>(x)};
}

// Where the workspace of CUDA's persistent blocks lies, and their number; (0, 0) for the CPU.
using WorkspaceArguments = std::pair<Address, int64_t>;

BlockWorkspace block_workspace(WorkspaceArguments x) {
    return {pointer<float>(x.first), x.second};
}

NormForward layer_norm_forward(Address x, Address y, PythonTensor weight, PythonTensor bias, Address stats,
                               PythonTensor shape, NormArguments options, WorkspaceArguments workspace) {
    return {pointer<void>(x),          pointer<void>(y), {parameter(weight), parameter(bias)},
            pointer<float>(stats),     row_shape(shape), norm_options(options),
            block_workspace(workspace)};
}

NormBackward layer_norm_backward(Address dy, Address x, Address dx, PythonTensor weight, PythonTensor dweight,
                                 PythonTensor dbias, Address stats, PythonTensor shape,
                                 WorkspaceArguments workspace) {
    return {pointer<void>(dy),
            pointer<void>(x),
            pointer<void>(dx),
            parameter(weight),
            0.0f,
            {parameter(dweight), parameter(dbias)},
            pointer<float>(stats),
            row_shape(shape),
            block_workspace(workspace)};
}

NormForward rms_norm_forward(Address x, Address y, PythonTensor weight, Address stats, PythonTensor shape,
                             RmsArguments options, WorkspaceArguments workspace) {
    return {pointer<void>(x), pointer<void>(y),     {parameter(weight), {}},   pointer<float>(stats),
            row_shape(shape), rms_options(options), block_workspace(workspace)};
}

NormBackward rms_norm_backward(Address dy, Address x, Address dx, PythonTensor weight, float weight_offset,
                               PythonTensor dweight, Address stats, PythonTensor shape,
                               WorkspaceArguments workspace) {
    return {pointer<void>(dy),     pointer<void>(x), pointer<void>(dx),
            parameter(weight),     weight_offset,    {parameter(dweight), {}},
            pointer<float>(stats), row_shape(shape), block_workspace(workspace)};
}

// `shape` is that of a tensor of the trunk. The parameters are those of the post norm, then of the pre norm:
// weight, bias, weight, bias.
SandwichForward sandwich_forward(PythonTensor branch, Address residual, Address residual_out,
                                 PythonTensor normed, std::array<PythonTensor, 4> parameters, Address stats,
                                 PythonTensor shape, NormArguments options, DropoutArguments drop,
                                 WorkspaceArguments workspace) {
    return {branch.data,
            pointer<void>(residual),
            pointer<void>(residual_out),
            normed.data,
            {parameter(parameters[0]), parameter(parameters[1])},
            {parameter(parameters[2]), parameter(parameters[3])},
            pointer<float>(stats),
            row_shape(shape),
            branch.dtype,
            normed.dtype,
            norm_options(options),
            dropout(drop),
            block_workspace(workspace)};
}

SandwichBackward sandwich_backward(Address dresidual_out, PythonTensor dnormed, PythonTensor branch,
                                   Address residual_out, Address dbranch, Address dresidual,
                                   std::array<PythonTensor, 2> weights, std::array<PythonTensor, 4> gradients,
                                   Address stats, PythonTensor shape, DropoutArguments drop,
                                   WorkspaceArguments workspace) {
    return {pointer<void>(dresidual_out),
            dnormed.data,
            branch.data,
            pointer<void>(residual_out),
            pointer<void>(dbranch),
            pointer<void>(dresidual),
            parameter(weights[0]),
            parameter(weights[1]),
            0.0f,
            {parameter(gradients[0]), parameter(gradients[1])},
            {parameter(gradients[2]), parameter(gradients[3])},
            pointer<float>(stats),
            row_shape(shape),
            branch.dtype,
            dnormed.dtype,
            dropout(drop),
            block_workspace(workspace)};
}

// weights: of the post norm, then of the pre norm.
SandwichForward sandwich_rms_forward(PythonTensor branch, Address residual, Address residual_out,
                                     PythonTensor normed, std::array<PythonTensor, 2> weights, Address stats,
                                     PythonTensor shape, RmsArguments options, DropoutArguments drop,
                                     WorkspaceArguments workspace) {
    return {branch.data,
            pointer<void>(residual),
            pointer<void>(residual_out),
            normed.data,
            {parameter(weights[0]), {}},
            {parameter(weights[1]), {}},
            pointer<float>(stats),
            row_shape(shape),
            branch.dtype,
            normed.dtype,
            rms_options(options),
            dropout(drop),
            block_workspace(workspace)};
}

SandwichBackward sandwich_rms_backward(Address dresidual_out, PythonTensor dnormed, PythonTensor branch,
                                       Address residual_out, Address dbranch, Address dresidual,
                                       std::array<PythonTensor, 2> weights, float weight_offset,
                                       std::array<PythonTensor, 2> gradients, Address stats,
                                       PythonTensor shape, DropoutArguments drop,
                                       WorkspaceArguments workspace) {
    return {pointer<void>(dresidual_out),
            dnormed.data,
            branch.data,
            pointer<void>(residual_out),
            pointer<void>(dbranch),
            pointer<void>(dresidual),
            parameter(weights[0]),
            parameter(weights[1]),
            weight_offset,
            {parameter(gradients[0]), {}},
            {parameter(gradients[1]), {}},
            pointer<float>(stats),
            row_shape(shape),
            branch.dtype,
            dnormed.dtype,
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

// Where logits lie, the stride of a row, ids, tokens, the first id, bias, softcap, dtype.
using LogitsArguments = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, Address, float, int>;

Logits cross_entropy_logits(LogitsArguments x) {
    return {
        pointer<void>(std::get<0>(x)),  std::get<1>(x), std::get<2>(x),       std::get<3>(x), std::get<4>(x),
        pointer<float>(std::get<5>(x)), std::get<6>(x), DType(std::get<7>(x))};
}

LinearCrossEntropyReduce cross_entropy_reduce(LogitsArguments logits, Address target, Address logit_max,
                                              Address total, Address picked, Address sum, Address predicted) {
    return {cross_entropy_logits(logits), pointer<int64_t>(target), pointer<float>(logit_max),
            pointer<float>(total),        pointer<float>(picked),   pointer<float>(sum),
            pointer<int64_t>(predicted)};
}

// z_loss, id_share, target_share.
using ObjectiveArguments = std::tuple<float, float, float>;

LinearCrossEntropyGradient cross_entropy_gradient(LogitsArguments logits, ObjectiveArguments objective,
                                                  Address target, Address coefficient, Address logit_max,
                                                  Address total, Address dbias) {
    return {cross_entropy_logits(logits), std::get<0>(objective),   std::get<1>(objective),
            std::get<2>(objective),       pointer<int64_t>(target), pointer<float>(coefficient),
            pointer<float>(logit_max),    pointer<float>(total),    pointer<float>(dbias)};
}

LinearCrossEntropyProduct cross_entropy_product(const PythonTensor& a, const PythonTensor& b,
                                                const PythonTensor& out, bool add, Address low, bool last) {
    return {a.size[0],   b.size[1],   a.size[1], a.data,        a.stride[0], a.stride[1],           b.data,
            b.stride[0], b.stride[1], out.data,  out.stride[0], add,         pointer<uint8_t>(low), last,
            out.dtype};
}

// A tensor of attention, its rows contiguous, or None.
StridedInput strided_input(const PythonTensor& x) {
    return {x.data, {x.stride[0], x.stride[1], x.stride[2]}};
}

StridedOutput strided_output(const PythonTensor& x) {
    return {x.data, {x.stride[0], x.stride[1], x.stride[2]}};
}

// A contiguous tensor of integers, or None.
IntegerList integer_list(const PythonTensor& x) {
    return {x.data, x.bytes};
}

// Pivots [B, P], block size, window blocks, pivot bias, causal, starts [B].
using LayoutArguments = std::tuple<PythonTensor, int64_t, int64_t, float, bool, PythonTensor>;

// For a sequence of `length` positions, past which neither block nor window reach.
Layout layout_within(int64_t length, const LayoutArguments& x) {
    length = std::max<int64_t>(1, length);
    const PythonTensor& pivots = std::get<0>(x);
    const int64_t block_size = std::min(std::get<1>(x), length);
    const int64_t window_blocks = std::min(std::get<2>(x), (length - 1) / block_size + 1);
    return {integer_list(pivots), int(pivots.last), int(block_size),
            int(window_blocks),   std::get<3>(x),   integer_list(std::get<5>(x)),
            std::get<4>(x)};
}

// The sizes, in the order of AttentionShape.
using AttentionSizes = std::array<int, 5>;

Attention attention(const PythonTensor& q, const PythonTensor& k, const PythonTensor& v, AttentionSizes shape,
                    const LayoutArguments& layout, float scale, DropoutArguments drop, int dtype,
                    Address sorted_pivots) {
    return {{shape[0], shape[1], shape[2], shape[3], shape[4]},
            layout_within(shape[3], layout),
            dropout(drop),
            scale,
            DType(dtype),
            strided_input(q),
            strided_input(k),
            strided_input(v),
            pointer<int32_t>(sorted_pivots)};
}

AttentionForward attention_forward(PythonTensor q, PythonTensor k, PythonTensor v, PythonTensor out,
                                   Address lse, AttentionSizes shape, LayoutArguments layout, float scale,
                                   DropoutArguments drop, int dtype, Address sorted_pivots) {
    return {attention(q, k, v, shape, layout, scale, drop, dtype, sorted_pivots), strided_output(out),
            pointer<float>(lse)};
}

// index: padded pivots and integers of a sample, block size, window blocks; scores: factor and bias.
[[maybe_unused]] AttentionForwardSm90 attention_forward_sm90(PythonTensor q, PythonTensor k, PythonTensor v,
                                                             PythonTensor out, Address lse, Address residuals,
                                                             std::tuple<int, int64_t, int, int> index,
                                                             std::pair<float, float> scores) {
    return {{int(q.size[0]), int(q.size[1]), int(k.size[1]), int(q.size[2]), int(q.size[3])},
            q.dtype,
            strided_input(q),
            strided_input(k),
            strided_input(v),
            strided_output(out),
            pointer<float>(lse),
            pointer<int32_t>(residuals),
            std::get<0>(index),
            std::get<1>(index),
            std::get<2>(index),
            std::get<3>(index),
            scores.first,
            scores.second};
}

// inputs: q, k, v, out, dout; gradients: dq, dk, dv; workspace (CUDA): delta, dk_far, dv_far.
AttentionBackward attention_backward(std::array<PythonTensor, 5> inputs, Address lse, Address dlse,
                                     std::array<PythonTensor, 3> gradients, AttentionSizes shape,
                                     LayoutArguments layout, float scale, DropoutArguments drop, int dtype,
                                     Address sorted_pivots, std::array<Address, 3> workspace) {
    return {attention(inputs[0], inputs[1], inputs[2], shape, layout, scale, drop, dtype, sorted_pivots),
            strided_input(inputs[3]),
            strided_input(inputs[4]),
            pointer<float>(lse),
            pointer<float>(dlse),
            strided_output(gradients[0]),
            strided_output(gradients[1]),
            strided_output(gradients[2]),
            pointer<float>(workspace[0]),
            pointer<float>(workspace[1]),
            pointer<float>(workspace[2])};
}

// q [B, H, Tq, D], caches [B, Hkv, S, D]; splits (CUDA): keys of a block, blocks of a row, where they leave
// their parts, their counters.
DecodeAttention decode_arguments(const PythonTensor& q, const PythonTensor& k_cache,
                                 const PythonTensor& v_cache, const PythonTensor& lengths,
                                 const PythonTensor& out, const LayoutArguments& layout, float scale,
                                 std::tuple<int, int, Address, Address> splits) {
    const auto& [B, H, Tq, D] = q.size;
    const int64_t Hkv = k_cache.size[1], S = k_cache.size[2];
    return {{int(B), int(H), int(Hkv), int(Tq), int(S), int(D)},
            layout_within(S, layout),
            scale,
            q.dtype,
            strided_input(q),
            strided_input(k_cache),
            strided_input(v_cache),
            strided_output(out),
            integer_list(lengths),
            std::get<0>(splits),
            std::get<1>(splits),
            pointer<float>(std::get<2>(splits)),
            pointer<int>(std::get<3>(splits))};
}

// x [..., K], weight [O, K].
DecodeLinear decode_linear(const PythonTensor& x, const PythonTensor& weight, const PythonTensor& bias,
                           const PythonTensor& y, bool gelu) {
    return {x.data, weight.data,    bias.data,        y.data, x.elements / x.last,
            x.last, weight.size[0], weight.stride[0], gelu,   x.dtype};
}

// Weights and biases of the norms and linear layers of a DecodeStepLayer, in its order.
constexpr size_t kLayerTensors = 16;

// Whether what `x` holds lies in one piece, row by row; of its first four dimensions.
bool is_contiguous(const PythonTensor& x) {
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
        if (x.size[i] > 1 && x.stride[i] != stride) return false;
        stride *= std::max<int64_t>(1, x.size[i]);
    }
    return true;
}

DecodeStepLayer decode_step_layer(const PythonTensor* x) {
    const auto affine = [x](int i) { return Affine{parameter(x[i]), parameter(x[i + 1])}; };
    const auto linear = [x](int i) { return LinearWeights{x[i].data, x[i + 1].data}; };
    return {affine(0), linear(2), linear(4), affine(6), affine(8), linear(10), linear(12), affine(14)};
}

// The tensors of a LayerStack as decode_step wants them: to read them anew takes as long as a short step
// does. It holds the list of them.
struct DecodeStack {
    std::vector<DecodeStepLayer> layers;
    Affine final_norm;
    int64_t F;
};

// Of each layer, then weight and bias of the norm after them.
DecodeStack decode_stack(const std::vector<PythonTensor>& tensors) {
    if (!std::all_of(tensors.begin(), tensors.end(), is_contiguous))
        throw std::invalid_argument("decode_step: the tensors of stack must be contiguous");
    if (tensors.size() < kLayerTensors + 2 || (tensors.size() - 2) % kLayerTensors != 0)
        throw std::invalid_argument("decode_step: stack must have " + std::to_string(kLayerTensors) +
                                    " tensors a layer and two more, got " + std::to_string(tensors.size()));
    DecodeStack stack = {};
    const size_t last = tensors.size() - 2;
    for (size_t i = 0; i < last; i += kLayerTensors) stack.layers.push_back(decode_step_layer(&tensors[i]));
    stack.final_norm = {parameter(tensors[last]), parameter(tensors[last + 1])};
    stack.F = tensors[10].size[0];
    return stack;
}

// x [B, T, C]; head [V, C] or None; y [B, T, V], or as x; cache [L, 2, B, H, S, D].
DecodeStep decode_step(const PythonTensor& x, const PythonTensor& y, const PythonTensor& head,
                       const DecodeStack& stack, const PythonTensor& cache, const PythonTensor& lengths,
                       const LayoutArguments& layout, NormArguments options) {
    const int64_t B = x.size[0], C = x.last, L = int64_t(stack.layers.size());
    DecodeStep a = {};
    a.x = x.data;
    a.y = y.data;
    a.layers = stack.layers.data();
    a.L = L;
    a.final_norm = stack.final_norm;
    a.head = head.data;
    a.V = head.size[0];
    a.head_stride = head.stride[0];
    a.cache = cache.data;
    a.lengths = integer_list(lengths);
    a.B = B;
    a.T = x.size[1];
    a.C = C;
    a.H = cache.size[3];
    a.S = cache.elements / (2 * L * B * C);
    a.F = stack.F;
    a.layout = layout_within(a.S, layout);
    a.norms = norm_options(options);
    a.dtype = x.dtype;
    return a;
}

// Seeds [B], contiguous, int64; what is added to positions; temperature; top_k; the sum of the logits, [] or
// None.
using DrawingArguments = std::tuple<PythonTensor, int64_t, float, int64_t, PythonTensor>;

// logits [B, T, V], contiguous; positions and drawn [B, T], contiguous, int64.
DrawTokens draw_tokens(const PythonTensor& logits, const PythonTensor& positions, const PythonTensor& drawn,
                       const DrawingArguments& drawing) {
    return {logits.data,
            positions.elements,
            positions.last,
            logits.last,
            logits.dtype,
            static_cast<const int64_t*>(std::get<0>(drawing).data),
            static_cast<const int64_t*>(positions.data),
            std::get<1>(drawing),
            std::get<2>(drawing),
            std::get<3>(drawing),
            static_cast<int64_t*>(drawn.data),
            static_cast<float*>(std::get<4>(drawing).data)};
}

// rows: last [B, 1], tokens [B, W], done [B, 1]; embedding: words and positions [.., C], restart [B, 1] or
// None; all contiguous, integers int64. The rest as of decode_step and draw_tokens.
DrawStep draw_step(const std::array<PythonTensor, 3>& rows, const std::array<PythonTensor, 3>& embedding,
                   const PythonTensor& head, const DecodeStack& stack, const PythonTensor& cache,
                   const PythonTensor& lengths, NormArguments options, const DrawingArguments& drawing) {
    const auto& [last, tokens, done] = rows;
    const auto& [words, positions, restart] = embedding;
    PythonTensor x = words;
    x.size = {lengths.elements, 1};
    const LayoutArguments every_key = {{}, std::numeric_limits<int64_t>::max(), 1, 0.0f, true, {}};
    DrawStep a = {};
    a.step = decode_step(x, x, head, stack, cache, lengths, every_key, options);
    PythonTensor logits = words;
    logits.last = a.step.V;
    a.draw = draw_tokens(logits, done, done, drawing);
    a.words = words.data;
    a.positions = positions.data;
    a.num_words = words.size[0];
    a.num_positions = positions.size[0];
    a.restart = static_cast<const int64_t*>(restart.data);
    a.lengths = static_cast<int64_t*>(lengths.data);
    a.last = static_cast<int64_t*>(last.data);
    a.tokens = static_cast<int64_t*>(tokens.data);
    a.done = static_cast<int64_t*>(done.data);
    a.W = tokens.last;
    return a;
}

// The fields of Window, in their order.
using WindowArguments = std::tuple<int, int, int, int, int, bool>;

// inputs: q, k, v, extra_k, extra_v; shape: B, H, Hkv, D, E.
LocalAttention local_attention(const PythonTensor* inputs, Address extra_mask, std::array<int, 5> shape,
                               const WindowArguments& window, float scale, DropoutArguments drop, int dtype) {
    return {shape[0],
            shape[1],
            shape[2],
            shape[3],
            shape[4],
            {std::get<0>(window), std::get<1>(window), std::get<2>(window), std::get<3>(window),
             std::get<4>(window), std::get<5>(window)},
            dropout(drop),
            scale,
            DType(dtype),
            strided_input(inputs[0]),
            strided_input(inputs[1]),
            strided_input(inputs[2]),
            strided_input(inputs[3]),
            strided_input(inputs[4]),
            pointer<uint8_t>(extra_mask)};
}

LocalAttentionForward local_attention_forward(std::array<PythonTensor, 5> inputs, PythonTensor out,
                                              Address lse, Address extra_mask, std::array<int, 5> shape,
                                              WindowArguments window, float scale, DropoutArguments drop,
                                              int dtype) {
    return {local_attention(inputs.data(), extra_mask, shape, window, scale, drop, dtype),
            strided_output(out), pointer<float>(lse)};
}

// inputs: those of the forward, out, dout; gradients: of the forward's inputs.
LocalAttentionBackward local_attention_backward(std::array<PythonTensor, 7> inputs, Address lse, Address dlse,
                                                std::array<PythonTensor, 5> gradients, Address extra_mask,
                                                std::array<int, 5> shape, WindowArguments window, float scale,
                                                DropoutArguments drop, int dtype) {
    return {local_attention(inputs.data(), extra_mask, shape, window, scale, drop, dtype),
            strided_input(inputs[5]),
            strided_input(inputs[6]),
            pointer<float>(lse),
            pointer<float>(dlse),
            strided_output(gradients[0]),
            strided_output(gradients[1]),
            strided_output(gradients[2]),
            strided_output(gradients[3]),
            strided_output(gradients[4])};
}

// Four attentions each; shape: B, H, T, D, how many there are.
using MergedRows = std::array<PythonTensor, kMostMerged>;
using MergedSums = std::array<Address, kMostMerged>;

MergeAttention merge_attention(const MergedRows& outputs, const MergedSums& lses,
                               std::array<int64_t, 5> shape, int dtype) {
    MergeAttention a = {shape[0], shape[1], shape[2], shape[3], shape[4], DType(dtype), {}, {}};
    for (int i = 0; i < kMostMerged; ++i) {
        a.outputs[i] = strided_input(outputs[i]);
        a.lses[i] = pointer<float>(lses[i]);
    }
    return a;
}

MergeAttentionForward merge_forward(MergedRows outputs, MergedSums lses, PythonTensor out, Address lse,
                                    std::array<int64_t, 5> shape, int dtype) {
    return {merge_attention(outputs, lses, shape, dtype), strided_output(out), pointer<float>(lse)};
}

MergeAttentionBackward merge_backward(MergedRows outputs, MergedSums lses, PythonTensor dout, Address dlse,
                                      MergedRows doutputs, MergedSums dlses, std::array<int64_t, 5> shape,
                                      int dtype) {
    MergeAttentionBackward a = {
        merge_attention(outputs, lses, shape, dtype), strided_input(dout), pointer<float>(dlse), {}, {}};
    for (int i = 0; i < kMostMerged; ++i) {
        a.doutputs[i] = strided_output(doutputs[i]);
        a.dlses[i] = pointer<float>(dlses[i]);
    }
    return a;
}

// ---- from functions that make arguments to functions that Python calls by position or by name

template <typename Function, std::size_t N, std::size_t... I, typename... Extra>
void define(py::module_& m, const char* name, const Function& function, const char* const (&names)[N],
            std::index_sequence<I...>, const Extra&... extra) {
    m.def(name, function, py::arg(names[I])..., extra...);
}

// `name` takes what `make` takes, called `names`, and a number of threads. `pick` gives the function for the
// instruction set at each call.
template <typename Args, typename... Arguments, typename Pick>
void bind_cpu(py::module_& m, const char* name, Args (*make)(Arguments...),
              const char* const (&names)[sizeof...(Arguments)], Pick pick) {
    define(
        m, name, [=](Arguments... arguments, int threads) { pick()(make(arguments...), threads); }, names,
        std::index_sequence_for<Arguments...>{}, py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

// `name` takes what `make` takes, called `names`, and a cudaStream_t.
template <typename Args, typename... Arguments>
[[maybe_unused]] void bind_cuda(py::module_& m, const char* name, Args (*make)(Arguments...),
                                const char* const (&names)[sizeof...(Arguments)],
                                void (*run)(const Args&, void*)) {
    define(
        m, name,
        [=](Arguments... arguments, Address stream) { run(make(arguments...), pointer<void>(stream)); },
        names, std::index_sequence_for<Arguments...>{}, py::arg("stream"));
}

// What the functions above call their arguments.
constexpr const char* kSoftmaxForward[] = {"scores",      "mask",  "probs", "shape",  "scores_stride",
                                           "mask_stride", "alpha", "scale", "causal", "dtype"};
constexpr const char* kSoftmaxBackward[] = {"dprobs", "probs", "dscores", "rows", "N", "factor", "dtype"};
constexpr const char* kLayerNormForward[] = {"x",     "y",     "weight",  "bias",
                                             "stats", "shape", "options", "workspace"};
constexpr const char* kLayerNormBackward[] = {"dy",    "x",     "dx",    "weight",   "dweight",
                                              "dbias", "stats", "shape", "workspace"};
constexpr const char* kRmsNormForward[] = {"x", "y", "weight", "stats", "shape", "options", "workspace"};
constexpr const char* kRmsNormBackward[] = {"dy",      "x",     "dx",    "weight",   "weight_offset",
                                            "dweight", "stats", "shape", "workspace"};
constexpr const char* kSandwichForward[] = {"branch", "residual", "residual_out", "normed",  "parameters",
                                            "stats",  "shape",    "options",      "dropout", "workspace"};
constexpr const char* kSandwichBackward[] = {"dresidual_out", "dnormed",   "branch",  "residual_out",
                                             "dbranch",       "dresidual", "weights", "gradients",
                                             "stats",         "shape",     "dropout", "workspace"};
constexpr const char* kSandwichRmsForward[] = {"branch", "residual", "residual_out", "normed",  "weights",
                                               "stats",  "shape",    "options",      "dropout", "workspace"};
constexpr const char* kSandwichRmsBackward[] = {
    "dresidual_out", "dnormed",   "branch", "residual_out", "dbranch", "dresidual", "weights",
    "weight_offset", "gradients", "stats",  "shape",        "dropout", "workspace"};
constexpr const char* kReduce[] = {"logits", "target", "logit_max", "total", "picked", "sum", "predicted"};
constexpr const char* kGradient[] = {"logits",    "objective", "target", "coefficient",
                                     "logit_max", "total",     "dbias"};
constexpr const char* kProduct[] = {"a", "b", "out", "add", "low", "last"};
constexpr const char* kAttentionForward[] = {"q",      "k",     "v",       "out",   "lse",          "shape",
                                             "layout", "scale", "dropout", "dtype", "sorted_pivots"};
[[maybe_unused]] constexpr const char* kAttentionForwardSm90[] = {"q",   "k",         "v",     "out",
                                                                  "lse", "residuals", "index", "scores"};
constexpr const char* kAttentionBackward[] = {"inputs", "lse",           "dlse",     "gradients",
                                              "shape",  "layout",        "scale",    "dropout",
                                              "dtype",  "sorted_pivots", "workspace"};
constexpr const char* kDecode[] = {"q", "k_cache", "v_cache", "lengths", "out", "layout", "scale", "splits"};
constexpr const char* kLinear[] = {"x", "weight", "bias", "y", "gelu"};
constexpr const char* kStep[] = {"x", "y", "head", "stack", "cache", "lengths", "layout", "options"};
constexpr const char* kDraw[] = {"logits", "positions", "drawn", "drawing"};
constexpr const char* kDrawStep[] = {"rows",  "embedding", "head",    "stack",
                                     "cache", "lengths",   "options", "drawing"};
constexpr const char* kLocalForward[] = {"inputs", "out",   "lse",     "extra_mask", "shape",
                                         "window", "scale", "dropout", "dtype"};
constexpr const char* kLocalBackward[] = {"inputs", "lse",    "dlse",  "gradients", "extra_mask",
                                          "shape",  "window", "scale", "dropout",   "dtype"};
constexpr const char* kMergeForward[] = {"outputs", "lses", "out", "lse", "shape", "dtype"};
constexpr const char* kMergeBackward[] = {"outputs",  "lses",  "dout",  "dlse",
                                          "doutputs", "dlses", "shape", "dtype"};

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of cogview_kernels; called by cogview_kernels/<op>/native.py.";
    m.attr("has_cuda") = bool(COGVIEW_HAS_CUDA);
    m.def("isa", &isa_name);
    m.def("set_isa", &set_isa, py::arg("name"));
    m.def("is_amd", &is_amd);
    m.def("parallel_runtime", &parallel_runtime);
    m.def("free_workspaces", &free_workspaces);
    m.def("signature", &signature, py::arg("recording"));

    bind_cpu(m, "stable_softmax_fwd_cpu", softmax_forward, kSoftmaxForward,
             [] { return COGVIEW_PICK_ISA(stable_softmax_fwd_cpu); });
    bind_cpu(m, "stable_softmax_bwd_cpu", softmax_backward, kSoftmaxBackward,
             [] { return COGVIEW_PICK_ISA(stable_softmax_bwd_cpu); });
    bind_cpu(m, "layer_norm_fwd_cpu", layer_norm_forward, kLayerNormForward,
             [] { return COGVIEW_PICK_ISA(layer_norm_fwd_cpu); });
    bind_cpu(m, "layer_norm_bwd_cpu", layer_norm_backward, kLayerNormBackward,
             [] { return COGVIEW_PICK_ISA(layer_norm_bwd_cpu); });
    bind_cpu(m, "sandwich_layer_norm_fwd_cpu", sandwich_forward, kSandwichForward,
             [] { return COGVIEW_PICK_ISA(sandwich_layer_norm_fwd_cpu); });
    bind_cpu(m, "sandwich_layer_norm_bwd_cpu", sandwich_backward, kSandwichBackward,
             [] { return COGVIEW_PICK_ISA(sandwich_layer_norm_bwd_cpu); });
    bind_cpu(m, "rms_norm_fwd_cpu", rms_norm_forward, kRmsNormForward,
             [] { return COGVIEW_PICK_ISA(rms_norm_fwd_cpu); });
    bind_cpu(m, "rms_norm_bwd_cpu", rms_norm_backward, kRmsNormBackward,
             [] { return COGVIEW_PICK_ISA(rms_norm_bwd_cpu); });
    bind_cpu(m, "sandwich_rms_norm_fwd_cpu", sandwich_rms_forward, kSandwichRmsForward,
             [] { return COGVIEW_PICK_ISA(sandwich_rms_norm_fwd_cpu); });
    bind_cpu(m, "sandwich_rms_norm_bwd_cpu", sandwich_rms_backward, kSandwichRmsBackward,
             [] { return COGVIEW_PICK_ISA(sandwich_rms_norm_bwd_cpu); });
    bind_cpu(m, "linear_cross_entropy_reduce_cpu", cross_entropy_reduce, kReduce,
             [] { return COGVIEW_PICK_ISA_WITH_BF16(linear_cross_entropy_reduce_cpu); });
    bind_cpu(m, "linear_cross_entropy_gradient_cpu", cross_entropy_gradient, kGradient,
             [] { return COGVIEW_PICK_ISA_WITH_BF16(linear_cross_entropy_gradient_cpu); });
    bind_cpu(m, "linear_cross_entropy_product_cpu", cross_entropy_product, kProduct,
             [] { return COGVIEW_PICK_ISA_WITH_BF16(linear_cross_entropy_product_cpu); });
    bind_cpu(m, "three_region_attention_fwd_cpu", attention_forward, kAttentionForward, [] {
        return [](const AttentionForward& args, int threads) {
            const SortedPivots sorted_pivots(args.common.shape, args.common.layout);
            COGVIEW_PICK_ISA_WITH_BF16(three_region_attention_fwd_cpu)(args, sorted_pivots, threads);
        };
    });
    bind_cpu(m, "three_region_attention_bwd_cpu", attention_backward, kAttentionBackward, [] {
        return [](const AttentionBackward& args, int threads) {
            const SortedPivots sorted_pivots(args.common.shape, args.common.layout);
            COGVIEW_PICK_ISA_WITH_BF16(three_region_attention_bwd_cpu)(args, sorted_pivots, threads);
        };
    });
    bind_cpu(m, "decode_attention_cpu", decode_arguments, kDecode, [] {
        return [](const DecodeAttention& args, int threads) {
            const int64_t B = args.shape.B, S = args.shape.S;
            check_lengths("decode_attention", args.lengths, B, S, "the cache's size");
            check_pivots("decode_attention", args.layout, B, S);
            COGVIEW_PICK_ISA_WITH_BF16(decode_attention_cpu)(args, threads);
        };
    });
    bind_cpu(m, "decode_linear_cpu", decode_linear, kLinear,
             [] { return COGVIEW_PICK_ISA_WITH_BF16(decode_linear_cpu); });
    py::class_<DecodeStack>(m, "DecodeStack")
        .def(py::init(&decode_stack), py::arg("tensors"), py::keep_alive<1, 2>());
    bind_cpu(m, "decode_step_cpu", decode_step, kStep, [] { return decode_step_cpu; });
    bind_cpu(m, "draw_step_cpu", draw_step, kDrawStep, [] { return draw_step_cpu; });
    bind_cpu(m, "draw_tokens_cpu", draw_tokens, kDraw, [] { return COGVIEW_PICK_ISA(draw_tokens_cpu); });
    bind_cpu(m, "local_attention_2d_fwd_cpu", local_attention_forward, kLocalForward,
             [] { return COGVIEW_PICK_ISA_WITH_BF16(local_attention_2d_fwd_cpu); });
    bind_cpu(m, "local_attention_2d_bwd_cpu", local_attention_backward, kLocalBackward,
             [] { return COGVIEW_PICK_ISA(local_attention_2d_bwd_cpu); });
    bind_cpu(m, "merge_attention_fwd_cpu", merge_forward, kMergeForward,
             [] { return COGVIEW_PICK_ISA(merge_attention_fwd_cpu); });
    bind_cpu(m, "merge_attention_bwd_cpu", merge_backward, kMergeBackward,
             [] { return COGVIEW_PICK_ISA(merge_attention_bwd_cpu); });
#if COGVIEW_HAS_CUDA
    bind_cuda(m, "stable_softmax_fwd_cuda", softmax_forward, kSoftmaxForward, stable_softmax_fwd_cuda);
    bind_cuda(m, "stable_softmax_bwd_cuda", softmax_backward, kSoftmaxBackward, stable_softmax_bwd_cuda);
    bind_cuda(m, "layer_norm_fwd_cuda", layer_norm_forward, kLayerNormForward, layer_norm_fwd_cuda);
    bind_cuda(m, "layer_norm_bwd_cuda", layer_norm_backward, kLayerNormBackward, layer_norm_bwd_cuda);
    bind_cuda(m, "sandwich_layer_norm_fwd_cuda", sandwich_forward, kSandwichForward,
              sandwich_layer_norm_fwd_cuda);
    bind_cuda(m, "sandwich_layer_norm_bwd_cuda", sandwich_backward, kSandwichBackward,
              sandwich_layer_norm_bwd_cuda);
    bind_cuda(m, "rms_norm_fwd_cuda", rms_norm_forward, kRmsNormForward, rms_norm_fwd_cuda);
    bind_cuda(m, "rms_norm_bwd_cuda", rms_norm_backward, kRmsNormBackward, rms_norm_bwd_cuda);
    bind_cuda(m, "sandwich_rms_norm_fwd_cuda", sandwich_rms_forward, kSandwichRmsForward,
              sandwich_rms_norm_fwd_cuda);
    bind_cuda(m, "sandwich_rms_norm_bwd_cuda", sandwich_rms_backward, kSandwichRmsBackward,
              sandwich_rms_norm_bwd_cuda);
    bind_cuda(m, "three_region_attention_fwd_cuda", attention_forward, kAttentionForward,
              three_region_attention_fwd_cuda);
    bind_cuda(m, "three_region_attention_bwd_cuda", attention_backward, kAttentionBackward,
              three_region_attention_bwd_cuda);
    bind_cuda(m, "decode_attention_cuda", decode_arguments, kDecode, decode_attention_cuda);
#endif
#if COGVIEW_HAS_SM90
    bind_cuda(m, "three_region_attention_fwd_sm90", attention_forward_sm90, kAttentionForwardSm90,
              three_region_attention_fwd_sm90);
#endif
}
