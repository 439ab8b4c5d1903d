// Threads that wait for work. A call of the kernel may last less than a millisecond, so that they are kept.

#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

static inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
    static constexpr int SPINS = 2000;  // some 50 microseconds: to be woken takes as long
    std::mutex busy, gate;              // held during a job; around what follows
    std::condition_variable wake;
    const std::function<void(int)>* job = nullptr;
    int wanted = 0, joined = 0, workers = 0;
    std::atomic<int> inside{0};
    std::atomic<uint64_t> jobs{0};

    void work() {
        for (uint64_t seen = 0;;) {
            for (int spin = 0; spin < SPINS && jobs == seen; spin++) pause_briefly();
            std::unique_lock<std::mutex> lock(gate);
            wake.wait(lock, [&] { return jobs != seen; });
            seen = jobs;
            if (!job || joined == wanted) continue;
            const std::function<void(int)>& mine = *job;
            const int number = ++joined;
            inside++;
            lock.unlock();
            mine(number);
            inside--;
        }
    }

   public:
    // task(0) here, and task(1) to task(threads - 1) elsewhere: those that come in time. While another caller has the
    // threads, this one works alone.
    void run(int threads, const std::function<void(int)>& task) {
        std::unique_lock<std::mutex> alone(busy, std::try_to_lock);
        if (threads <= 1 || !alone) return task(0);
        {
            std::lock_guard<std::mutex> lock(gate);
            try {
                for (; workers < threads - 1; workers++) std::thread(&Pool::work, this).detach();
            } catch (const std::system_error&) {  // no more threads: those that there are do the work
            }
            job = &task, wanted = threads - 1, joined = 0, jobs++;
        }
        wake.notify_all();
        task(0);
        {
            std::lock_guard<std::mutex> lock(gate);
            job = nullptr;
        }
        while (inside) pause_briefly();
    }
};

// Never destroyed, because its threads outlive main(), and made anew in a process that was forked and has none of them.
alignas(Pool) static char pool_memory[sizeof(Pool)];
static Pool* new_pool() { return new (pool_memory) Pool; }
static Pool* const pool = (pthread_atfork(nullptr, nullptr, [] { new_pool(); }), new_pool());

// Calls item(phase, index, thread) for all indices below size(phase) of phases 0, 1, ...; each phase begins when all of
// the one before is done. Nobody waits for a thread that has not taken an item.
template <typename Size, typename Item>
static void in_phases(int threads, int64_t phases, const Size& size, const Item& item) {
    std::atomic<int64_t> next{0}, done{0};
    pool->run(threads, [&](int thread) {
        int64_t phase = 0, start = 0;  // of the phase, in items from the first
        for (;;) {
            const int64_t own = next++;
            while (phase < phases && own >= start + size(phase)) start += size(phase++);
            if (phase == phases) return;
            for (int spin = 0; done.load(std::memory_order_acquire) < start; spin++)
                spin < 1000 ? pause_briefly() : std::this_thread::yield();
            item(phase, own - start, thread);
            done.fetch_add(1, std::memory_order_release);
        }
    });
    // The items that others took may still be on their way: run() waits for them.
}
