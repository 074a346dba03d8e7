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
    int (*thread_number)() = nullptr;
    std::string name = "std::thread";
    OpenMP() {
        thread_number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        if (thread_number == nullptr) return;
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

// Runs work(thread), a T's, on `threads` threads, this one, which is thread 0, among them; they may turn out
// to be fewer.
template <typename T>
void run_on_threads(int threads, T& job) {
    if (openmp().run != nullptr) {
        const auto call = [](void* data) { static_cast<T*>(data)->work(openmp().thread_number()); };
        openmp().run(call, &job, threads, 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back([&job, i] { job.work(i); });
    job.work(0);
    for (std::thread& other : others) other.join();
}

// Chunks in as many shares as threads. A thread begins with the share of its number, as PyTorch's loops do,
// so that it finds in its caches what it had before; then it helps the others.
class Job {
  public:
    Job(int64_t n, int64_t grain, int threads, void (*call)(const void*, int64_t, int64_t), const void* body)
        : n_(n), grain_(grain), count_(std::min(threads, kMostShares)), call_(call), body_(body) {
        const int64_t chunks = (n + grain - 1) / grain;
        for (int i = 0; i < count_; ++i) {
            shares_[i].next.store(chunks * i / count_, std::memory_order_relaxed);
            shares_[i].end = chunks * (i + 1) / count_;
        }
    }

    void work(int thread) {
        try {
            for (int i = 0; i < count_; ++i) {
                Share& share = shares_[(thread + i) % count_];
                while (share.next.load(std::memory_order_relaxed) < share.end) {
                    const int64_t begin = share.next.fetch_add(1) * grain_;
                    if (begin >= share.end * grain_) break;
                    call_(body_, begin, std::min(n_, begin + grain_));
                }
            }
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
            for (int i = 0; i < count_; ++i) shares_[i].next.store(shares_[i].end);
        }
    }

    // Once nobody works on it any more.
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    static constexpr int kMostShares = 16;
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };

    const int64_t n_, grain_;
    const int count_;
    void (*const call_)(const void*, int64_t, int64_t);
    const void* const body_;
    Share shares_[kMostShares];
    std::mutex mutex_;
    std::exception_ptr error_;
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
        job.work(0);
        // Whoever has counted itself as inside before the next line may hold the job; who does so after it
        // finds none.
        job_.store(nullptr);
        for (Patience patience; inside_.load() != 0;) patience.wait();
    }

    void end() { ended_.store(true); }

    // The others', until the end.
    void join(int thread) {
        Patience patience;
        for (int64_t seen = 0; !ended_.load();) {
            const int64_t posted = posted_.load();
            if (posted == seen) {
                patience.wait();
                continue;
            }
            seen = posted;
            inside_.fetch_add(1);
            if (Job* job = job_.load()) job->work(thread);
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

    void work(int thread) {
        if (std::this_thread::get_id() != owner) {
            team.join(thread);
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
    grain = std::max<int64_t>(1, grain);
    const int64_t chunks = (n + grain - 1) / grain;
    threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), chunks));
    Job job(n, grain, threads, call, body);
    if (threads == 1)
        job.work(0);
    else if (own_team != nullptr)
        own_team->run(job);
    else
        run_on_threads(threads, job);
    job.rethrow();
}

void parallel_region_run(int threads, void (*call)(const void*), const void* body) {
    if (threads <= 1 || own_team != nullptr) {
        call(body);
        return;
    }
    Region region;
    region.call = call;
    region.body = body;
    run_on_threads(threads, region);
    if (region.error) std::rethrow_exception(region.error);
}

bool in_parallel_region() {
    return own_team != nullptr;
}

const char* parallel_runtime() {
    return openmp().name.c_str();
}

}  // namespace cogview
