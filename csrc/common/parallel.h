// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

namespace cogview {

// What parallel_for runs on, for `python -m cogview_kernels.info`: "openmp (<library>)" or "std::thread".
const char* parallel_runtime();

void parallel_run(int64_t n, int64_t grain, int threads, void (*call)(const void*, int64_t, int64_t),
                  const void* body);

// Calls body(begin, end) over disjoint chunks of [0, n), each of at most `grain` items, on up to `threads`
// threads. Each begins with its own share of them and then takes what others have left, so what a body
// computes must not depend on who runs it.
//
// The threads are those of the OpenMP runtime that PyTorch has already loaded, found at run time: a second
// runtime's idle threads would spin against PyTorch's. Without one, plain std::thread.
//
// A template over a plain function pointer, not std::function: files compiled per instruction set must not
// share inline functions (see common/vec.h).
template <typename Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
    parallel_run(
        n, grain, threads,
        [](const void* b, int64_t begin, int64_t end) { (*static_cast<const Body*>(b))(begin, end); }, &body);
}

// Calls body(first, count, threads) for all heads, some at a time. Where it keeps all threads busy, one
// thread does a head from packing its keys to the end, so that they stay in the caches of its core; else all
// threads share `most` heads.
template <typename Body>
void for_each_head(int64_t heads, int64_t most, int threads, const Body& body) {
    if (heads % threads == 0 || heads >= 4 * threads) {
        parallel_for(heads, 1, threads, [&](int64_t head, int64_t) { body(head, 1, 1); });
        return;
    }
    for (int64_t first = 0; first < heads; first += most) body(first, std::min(most, heads - first), threads);
}

void parallel_region_run(int threads, void (*call)(const void*), const void* body);

// Calls body() once, on this thread. Meanwhile up to `threads` - 1 others are awake and take part in each
// parallel_for of body(), which then costs a fraction of a microsecond beyond its work, where waking threads
// costs several. For a chain of short loops with little between them: the others wait busily.
template <typename Body>
void parallel_region(int threads, const Body& body) {
    parallel_region_run(threads, [](const void* b) { (*static_cast<const Body*>(b))(); }, &body);
}

// Whether this thread is the one that runs the body of a region: then small chunks pay, too.
bool in_parallel_region();

}  // namespace cogview
