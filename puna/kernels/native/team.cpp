#include "team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace puna {

namespace {

constexpr int SPINS = 20000;  // about 50 to 100 microseconds

void breathe() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr int64_t LINE = 64, AT_ONCE = 2048;  // bytes; so many can be on their way

void ask(Next& next, int64_t bytes) {
    for (; bytes > 0 && next.bytes > 0; bytes -= LINE, next.bytes -= LINE, next.data += LINE)
        __builtin_prefetch(next.data, 0, 2);
}

void until_not(const std::atomic<uint32_t>& value, uint32_t old, Next next = {}) {
    for (int i = 0; i < SPINS; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        if (next.bytes > 0) ask(next, 4 * LINE);
        else breathe();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int threads) : size_(threads < 1 ? 1 : threads) {
    for (int i = 1; i < size_; i++) threads_.emplace_back([this, i] { serve(i); });
}

Team::~Team() {
    over_ = true;
    begun_.fetch_add(1, std::memory_order_release);
    begun_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Team::run(int lists, const std::function<void(int)>& job) {
    const std::lock_guard<std::mutex> lock(turn_);
    if (lists > lists_) {
        taken_ = std::make_unique<std::atomic<int64_t>[]>((int64_t)size_ * lists);
        lists_ = lists;
    }
    for (int64_t i = 0; i < (int64_t)size_ * lists_; i++) taken_[i].store(0, std::memory_order_relaxed);
    job_ = &job;
    begun_.fetch_add(1, std::memory_order_release);
    begun_.notify_all();
    job(0);
    wait();
}

void Team::wait(Next next) {
    if (size_ == 1) return;
    ask(next, AT_ONCE);
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)size_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
    } else {
        until_not(round_, round, next);
    }
}

void Team::serve(int thread) {
    for (uint32_t seen = 0;; seen++) {
        until_not(begun_, seen);
        if (over_) return;
        (*job_)(thread);
        wait();
    }
}

}  // namespace puna
