// SPDX-License-Identifier: Apache-2.0
// The ops of a step, one after the other, in one parallel region: at few rows each takes microseconds, which
// is what calling it from Python and waking the threads for it would cost. All arithmetic is theirs.
#include "decode_step/decode_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "common/positions.h"
#include "common/workspace.h"
#include "decode_attention/decode_attention.h"
#include "decode_linear/decode_linear.h"
#include "layer_norm/layer_norm.h"
#include "sandwich_layer_norm/sandwich_layer_norm.h"

namespace cogview {
namespace {

// Threads that are woken for less work cost more than they save, most of all when other processes want the
// processors too.
constexpr int64_t kProductsOfAThread = 1 << 20;

int64_t bytes_of(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}

// Activations, [rows, width] of the step's dtype.
struct Rows {
    Workspace memory;
    int64_t width;
    Rows(const DecodeStep& a, int64_t width)
        : memory((a.B * a.T * width * bytes_of(a.dtype) + 3) / 4), width(width) {}
    char* data() const { return reinterpret_cast<char*>(memory.data); }
};

class Step {
  public:
    Step(const DecodeStep& a, int threads)
        : a_(a),
          threads_(threads),
          element_(bytes_of(a.dtype)),
          x_(a, a.C),
          normed_(a, a.C),
          qkv_(a, 3 * a.C),
          attended_(a, a.C),
          hidden_(a, a.F),
          branch_(a, a.C) {
        check_lengths("decode_step", a.lengths, a.B, a.S - a.T, "the cache's size less the new tokens");
        check_pivots("decode_step", a.layout, a.B, a.S);
        for (int64_t b = 0; b < a.B; ++b) lengths_after_.push_back(a.lengths[b] + a.T);
    }

    void run() {
        norm(a_.layers[0].attention_pre);
        const void* residual = a_.x;
        for (int64_t i = 0; i < a_.L; ++i) {
            const DecodeStepLayer& layer = a_.layers[i];
            const bool last = i + 1 == a_.L;
            linear(normed_.data(), a_.C, layer.qkv, qkv_, false);
            append(i);
            attend(i);
            linear(attended_.data(), a_.C, layer.attention_out, branch_, false);
            sandwich(residual, layer.attention_post, layer.mlp_pre, normed_.data());
            residual = x_.data();
            linear(normed_.data(), a_.C, layer.mlp_up, hidden_, true);
            linear(hidden_.data(), a_.F, layer.mlp_down, branch_, false);
            sandwich(residual, layer.mlp_post, last ? a_.final_norm : a_.layers[i + 1].attention_pre,
                     last && a_.head == nullptr ? a_.y : normed_.data());
        }
        if (a_.head == nullptr) return;
        const DecodeLinear args = {normed_.data(), a_.head, nullptr,        a_.y,  a_.B * a_.T,
                                   a_.C,           a_.V,    a_.head_stride, false, a_.dtype};
        COGVIEW_PICK_ISA_WITH_BF16(decode_linear_cpu)(args, threads_);
    }

  private:
    void norm(const Affine& affine) {
        NormForward args = {};
        args.x = a_.x;
        args.y = normed_.data();
        args.affine = affine;
        args.shape = {a_.B * a_.T, a_.C, a_.dtype};
        args.options = a_.norms;
        COGVIEW_PICK_ISA(layer_norm_fwd_cpu)(args, threads_);
    }

    // x = residual + post(branch), normed = pre(x).
    void sandwich(const void* residual, const Affine& post, const Affine& pre, void* normed) {
        SandwichForward args = {};
        args.branch = branch_.data();
        args.residual = residual;
        args.residual_out = x_.data();
        args.normed = normed;
        args.post = post;
        args.pre = pre;
        args.shape = {a_.B * a_.T, a_.C, a_.dtype};
        args.branch_dtype = args.normed_dtype = a_.dtype;
        args.options = a_.norms;
        args.dropout.keep_scale = 1.0f;
        COGVIEW_PICK_ISA(sandwich_layer_norm_fwd_cpu)(args, threads_);
    }

    void linear(const void* x, int64_t K, const LinearWeights& w, const Rows& y, bool gelu) {
        const DecodeLinear args = {x, w.weight, w.bias, y.data(), a_.B * a_.T, K, y.width, K, gelu, a_.dtype};
        COGVIEW_PICK_ISA_WITH_BF16(decode_linear_cpu)(args, threads_);
    }

    // The keys (0) or values (1) of a layer, [B, H, S, D].
    char* cached(int64_t layer, int which) const {
        return static_cast<char*>(a_.cache) + (2 * layer + which) * a_.B * a_.S * a_.C * element_;
    }

    // The keys and values of the new tokens go behind those of the earlier ones.
    void append(int64_t layer) {
        const int64_t bytes = a_.C / a_.H * element_;
        for (int which = 0; which < 2; ++which)
            for (int64_t row = 0; row < a_.B * a_.T; ++row) {
                const int64_t b = row / a_.T, at = lengths_after_[b] - a_.T + row % a_.T;
                const char* from = qkv_.data() + (3 * row + 1 + which) * a_.C * element_;
                for (int64_t h = 0; h < a_.H; ++h)
                    std::memcpy(cached(layer, which) + ((b * a_.H + h) * a_.S + at) * bytes, from + h * bytes,
                                bytes);
            }
    }

    void attend(int64_t layer) {
        const int64_t D = a_.C / a_.H;
        DecodeAttention args = {};
        args.shape = {int(a_.B), int(a_.H), int(a_.H), int(a_.T), int(a_.S), int(D)};
        args.layout = a_.layout;
        args.scale = float(1.0 / std::sqrt(double(D)));
        args.dtype = a_.dtype;
        args.q = {qkv_.data(), {a_.T * 3 * a_.C, D, 3 * a_.C}};
        args.k = {cached(layer, 0), {a_.H * a_.S * D, a_.S * D, D}};
        args.v = {cached(layer, 1), {a_.H * a_.S * D, a_.S * D, D}};
        args.out = {attended_.data(), {a_.T * a_.C, D, a_.C}};
        args.lengths = {lengths_after_.data(), 8};
        COGVIEW_PICK_ISA_WITH_BF16(decode_attention_cpu)(args, threads_);
    }

    const DecodeStep& a_;
    const int threads_;
    const int64_t element_;
    const Rows x_, normed_, qkv_, attended_, hidden_, branch_;
    std::vector<int64_t> lengths_after_;
};

}  // namespace

void decode_step_cpu(const DecodeStep& args, int threads) {
    const int64_t products = args.L * args.B * args.T * args.C * (4 * args.C + 2 * args.F);
    threads = int(std::min<int64_t>(threads, 1 + products / kProductsOfAThread));
    Step step(args, threads);
    parallel_region(threads, [&] { step.run(); });
}

}  // namespace cogview
