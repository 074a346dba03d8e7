// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace cogview {
namespace {

// The entry point every OpenMP runtime offers to code compiled by GCC (libgomp, and LLVM's and Intel's
// through their compatibility layer).
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct OpenMP {
    GompParallel run = nullptr;
    std::string name = "std::thread";
    OpenMP() {
        run = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        Dl_info where;
        if (run != nullptr && dladdr(reinterpret_cast<void*>(run), &where) != 0) {
            std::string path = where.dli_fname;
            name = "openmp (" + path.substr(path.find_last_of('/') + 1) + ")";
        }
    }
};

// Looked up at the first call, when PyTorch is loaded for certain.
const OpenMP& openmp() {
    static const OpenMP found;
    return found;
}

struct Job {
    int64_t n, grain;
    void (*call)(const void*, int64_t, int64_t);
    const void* body;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::exception_ptr error;

    void work() {
        try {
            for (int64_t begin; (begin = next.fetch_add(grain)) < n;)
                call(body, begin, std::min(n, begin + grain));
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
            next.store(n);
        }
    }
};

}  // namespace

void parallel_run(int64_t n, int64_t grain, int threads, void (*call)(const void*, int64_t, int64_t),
                  const void* body) {
    if (n <= 0) return;
    Job job;
    job.n = n;
    job.grain = std::max<int64_t>(1, grain);
    job.call = call;
    job.body = body;
    const int64_t chunks = (n + job.grain - 1) / job.grain;
    threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), chunks));
    if (threads == 1) {
        job.work();
    } else if (openmp().run != nullptr) {
        openmp().run([](void* data) { static_cast<Job*>(data)->work(); }, &job, threads, 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) others.emplace_back([&job] { job.work(); });
        job.work();
        for (std::thread& other : others) other.join();
    }
    if (job.error) std::rethrow_exception(job.error);
}

const char* parallel_runtime() {
    return openmp().name.c_str();
}

}  // namespace cogview
