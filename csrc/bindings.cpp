// SPDX-License-Identifier: Apache-2.0
// The only file that knows Python. Tensors cross as addresses, sizes and strides (in elements), so the
// extension depends on no PyTorch version; cogview_kernels/<op>/autograd.py checks and allocates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "common/parallel.h"
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
    return {shape[0], shape[1], shape[2], shape[3],  shape[4],   shape[5],
            shape[6], shape[7], bias,     scale,     dropout_p,  drop_below,
            seed,     DType(dtype),       pointer<int64_t>(pivots)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of cogview_kernels; called by cogview_kernels/<op>/autograd.py.";
    m.attr("has_cuda") = bool(COGVIEW_HAS_CUDA);
    m.def("isa", &isa_name);
    m.def("set_isa", &set_isa);
    m.def("parallel_runtime", &parallel_runtime);

    m.def(
        "stable_softmax_fwd_cpu",
        [](Address scores, Address mask, Address probs, std::array<int64_t, 4> shape,
           std::array<int64_t, 4> scores_stride, std::array<int64_t, 4> mask_stride, float alpha, float scale,
           bool causal, int dtype, int threads) {
            COGVIEW_PICK_ISA(stable_softmax_fwd_cpu)
            (softmax_forward(scores, mask, probs, shape, scores_stride, mask_stride, alpha, scale, causal,
                             dtype),
             threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "stable_softmax_bwd_cpu",
        [](Address dprobs, Address probs, Address dscores, int64_t rows, int64_t N, float factor, int dtype,
           int threads) {
            COGVIEW_PICK_ISA(stable_softmax_bwd_cpu)
            (softmax_backward(dprobs, probs, dscores, rows, N, factor, dtype), threads);
        },
        py::call_guard<py::gil_scoped_release>());
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
            COGVIEW_PICK_ISA_WITH_BF16(three_region_attention_fwd_cpu)(args, SortedPivots(args.shape), threads);
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
            COGVIEW_PICK_ISA_WITH_BF16(three_region_attention_bwd_cpu)(args, SortedPivots(args.shape), threads);
        },
        py::call_guard<py::gil_scoped_release>());
#if COGVIEW_HAS_CUDA
    m.def("stable_softmax_fwd_cuda",
          [](Address scores, Address mask, Address probs, std::array<int64_t, 4> shape,
             std::array<int64_t, 4> scores_stride, std::array<int64_t, 4> mask_stride, float alpha,
             float scale, bool causal, int dtype, Address stream) {
              stable_softmax_fwd_cuda(softmax_forward(scores, mask, probs, shape, scores_stride, mask_stride,
                                                      alpha, scale, causal, dtype),
                                      pointer<void>(stream));
          });
    m.def("stable_softmax_bwd_cuda", [](Address dprobs, Address probs, Address dscores, int64_t rows,
                                        int64_t N, float factor, int dtype, Address stream) {
        stable_softmax_bwd_cuda(softmax_backward(dprobs, probs, dscores, rows, N, factor, dtype),
                                pointer<void>(stream));
    });
#endif
}
