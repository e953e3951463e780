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
        for (int turn = 0; turn < size_; turn++) {
            const int owner = (thread + turn) % size_;
            const int64_t begin = n * owner / size_, count = n * (owner + 1) / size_ - begin;
            std::atomic<int64_t>& taken = taken_[(int64_t)owner * lists_ + list];
            if (turn && taken.load(std::memory_order_relaxed) >= count) continue;
            for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < count;) work(begin + i);
        }
    }

    // Within a job: until all threads have come here. Meanwhile a thread asks for what it will read next: memory would be
    // idle otherwise, and what is asked for lies in the second cache then.
    void wait(Next next = {});

private:
    void serve(int thread);

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
