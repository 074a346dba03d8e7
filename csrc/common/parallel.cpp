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

// Runs call(data) on `threads` threads, this one among them; they may turn out to be fewer.
void run_on_threads(int threads, void (*call)(void*), void* data) {
    if (openmp().run != nullptr) {
        openmp().run(call, data, threads, 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(call, data);
    call(data);
    for (std::thread& other : others) other.join();
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

// A thread that waits for another: busily at first, then leaving the processor to whoever wants it, since on
// a machine that is shared the other may be the one that waits for a processor.
class Patience {
  public:
    void wait() {
        if (turns_++ >= kBusyTurns) {
            std::this_thread::yield();
            return;
        }
#if COGVIEW_X86
        __builtin_ia32_pause();
#endif
    }

  private:
    static constexpr int kBusyTurns = 2000;
    int turns_ = 0;
};

// The threads of a parallel_region: its owner posts jobs, the others join in.
class Team {
  public:
    // The owner's. Gives back when every chunk of the job is done and nobody looks at the job any more.
    void run(Job& job) {
        job_.store(&job);
        posted_.fetch_add(1);
        job.work();
        // Whoever has counted itself as inside before the next line may hold the job; who does so after it
        // finds none.
        job_.store(nullptr);
        for (Patience patience; inside_.load() != 0;) patience.wait();
    }

    void end() { ended_.store(true); }

    // The others', until the end.
    void join() {
        Patience patience;
        for (int64_t seen = 0; !ended_.load();) {
            const int64_t posted = posted_.load();
            if (posted == seen) {
                patience.wait();
                continue;
            }
            seen = posted;
            inside_.fetch_add(1);
            if (Job* job = job_.load()) job->work();
            inside_.fetch_sub(1);
            patience = Patience();
        }
    }

  private:
    std::atomic<Job*> job_{nullptr};
    std::atomic<int64_t> posted_{0};
    std::atomic<bool> ended_{false};
    alignas(64) std::atomic<int> inside_{0};  // apart from what those who wait keep reading
};

thread_local Team* own_team = nullptr;  // of the region whose body this thread runs

struct Region {
    void (*call)(const void*);
    const void* body;
    std::thread::id owner = std::this_thread::get_id();
    Team team;
    std::exception_ptr error;

    void work() {
        if (std::this_thread::get_id() != owner) {
            team.join();
            return;
        }
        own_team = &team;
        try {
            call(body);
        } catch (...) {
            error = std::current_exception();
        }
        own_team = nullptr;
        team.end();
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
    if (threads == 1)
        job.work();
    else if (own_team != nullptr)
        own_team->run(job);
    else
        run_on_threads(threads, [](void* data) { static_cast<Job*>(data)->work(); }, &job);
    if (job.error) std::rethrow_exception(job.error);
}

void parallel_region_run(int threads, void (*call)(const void*), const void* body) {
    if (threads <= 1 || own_team != nullptr) {
        call(body);
        return;
    }
    Region region;
    region.call = call;
    region.body = body;
    run_on_threads(threads, [](void* data) { static_cast<Region*>(data)->work(); }, &region);
    if (region.error) std::rethrow_exception(region.error);
}

bool in_parallel_region() {
    return own_team != nullptr;
}

const char* parallel_runtime() {
    return openmp().name.c_str();
}

}  // namespace cogview
