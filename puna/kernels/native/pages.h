// Memory for many numbers. What is megabytes large lies on large pages, where the system has some: rows of results are
// thousands of numbers apart, so that on small pages nearly every row's address has to be looked up anew.

#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <vector>

namespace puna {

constexpr size_t LARGE_PAGE = 2 << 20;

// Memory of `bytes` or a little more, for `free`; throws std::bad_alloc.
inline void* on_large_pages(size_t bytes) {
    bytes = (bytes + LARGE_PAGE - 1) & ~(LARGE_PAGE - 1);
    void* const at = aligned_alloc(LARGE_PAGE, bytes);
    if (!at) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(at, bytes, MADV_HUGEPAGE);  // the kernel may decline
#endif
    return at;
}

template <typename T>
struct LargePages {
    using value_type = T;
    LargePages() = default;
    template <typename U>
    LargePages(const LargePages<U>&) {}

    static bool many(size_t n) { return n * sizeof(T) >= LARGE_PAGE; }
    T* allocate(size_t n) { return many(n) ? (T*)on_large_pages(n * sizeof(T)) : std::allocator<T>().allocate(n); }
    void deallocate(T* at, size_t n) { many(n) ? free(at) : std::allocator<T>().deallocate(at, n); }
    bool operator==(const LargePages&) const { return true; }
};

template <typename T>
using Room = std::vector<T, LargePages<T>>;

}  // namespace puna
