// A team of threads that work through one job together.
//
// The caller of `run` is one of them. Within a job there is no leader: each thread takes the next piece of the current
// list of work until none is left (`each`), and waits for the others where a step needs all of the one before
// (`wait`). So a core that something else slows down takes fewer pieces, instead of holding up the rest.
//
// Who waits spins for some microseconds, then sleeps: an idle team costs nothing.

#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace puna {

class Team {
public:
    explicit Team(int threads);
    ~Team();
    int size() const { return size_; }

    // Runs job(thread) on all threads; `lists` is how many lists of work the job has.
    void run(int lists, const std::function<void(int)>& job);

    // Within a job: work(i) for every i < n that no other thread has taken, of the job's list number `list`.
    template <typename Work>
    void each(int list, int64_t n, const Work& work) {
        for (int64_t i; (i = taken_[list].fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    }

    // Within a job: until all threads have come here.
    void wait();

private:
    void serve(int thread);

    const int size_;
    std::vector<std::thread> threads_;
    std::unique_ptr<std::atomic<int64_t>[]> taken_;
    int lists_ = 0;
    const std::function<void(int)>* job_ = nullptr;
    std::mutex turn_;  // one job at a time
    std::atomic<uint32_t> begun_{0}, arrived_{0}, round_{0};
    std::atomic<bool> over_{false};
};

}  // namespace puna
