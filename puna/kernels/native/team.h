// A team of threads that work through one job together.
//
// The caller of `run` is one of them. Within a job there is no leader: a list of work is cut into a stretch for each
// thread, which takes the next piece of its own until none is left, and then of the others' (`each`); and it waits for
// the others where a step needs all of the one before (`wait`). So a core that something else slows down does fewer
// pieces, instead of holding up the rest, and one that nothing slows down reads neighbouring pieces one after the other:
// weights handed out piece by piece to whoever was free were read a third slower.
//
// Who waits spins for some microseconds, then sleeps: an idle team costs nothing.

#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace puna {

struct Next {  // what a thread will read
    const uint8_t* data = nullptr;
    int64_t bytes = 0;
};

class Team {
public:
    explicit Team(int threads);
    ~Team();
    int size() const { return size_; }

    // Runs job(thread) on all threads; `lists` is how many lists of work the job has.
    void run(int lists, const std::function<void(int)>& job);

    // Within a job, called by `thread`: work(i) for every i < n that no other thread has taken, of the job's list `list`.
    template <typename Work>
    void each(int thread, int list, int64_t n, const Work& work) {
        own(thread, list, n, work);
        help(thread, list, n, work);
    }

    // The two halves of `each`, for lists that need not wait for one another: own stretches first, and then the others'. To
    // look at another thread's count costs half a microsecond.
    template <typename Work>
    void own(int thread, int list, int64_t n, const Work& work) {
        take(thread, list, n, work);
    }
    template <typename Work>
    void help(int thread, int list, int64_t n, const Work& work) {
        for (int turn = 1; turn < size_; turn++) {
            const int owner = (thread + turn) % size_;
            if (taken(owner, list).load(std::memory_order_relaxed) < stretch(owner + 1, n) - stretch(owner, n))
                take(owner, list, n, work);
        }
    }

    // Where the stretch of a thread begins in a list of n pieces.
    int64_t stretch(int thread, int64_t n) const { return n * thread / size_; }

    // Within a job: until all threads have come here. Meanwhile a thread asks for what it will read next: memory would be
    // idle otherwise, and what is asked for lies in the second cache then.
    void wait(Next next = {});

private:
    void serve(int thread);
    std::atomic<int64_t>& taken(int owner, int list) { return taken_[(int64_t)owner * lists_ + list]; }

    template <typename Work>
    void take(int owner, int list, int64_t n, const Work& work) {
        const int64_t begin = stretch(owner, n), count = stretch(owner + 1, n) - begin;
        for (int64_t i; (i = taken(owner, list).fetch_add(1, std::memory_order_relaxed)) < count;) work(begin + i);
    }

    const int size_;
    std::vector<std::thread> threads_;
    std::unique_ptr<std::atomic<int64_t>[]> taken_;  // (threads, lists): how many pieces of each stretch
    int lists_ = 0;
    const std::function<void(int)>* job_ = nullptr;
    std::mutex turn_;  // one job at a time
    std::atomic<uint32_t> begun_{0}, arrived_{0}, round_{0};
    std::atomic<bool> over_{false};
};

}  // namespace puna
