// Which instruction set: the best that this processor has, or the one that was asked for.

#include <atomic>
#include <cstring>

#include "model.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace avx512bf16 { extern const puna::Ops ops; }
namespace avx512 { extern const puna::Ops ops; }
namespace avx2vnni { extern const puna::Ops ops; }
namespace avx2 { extern const puna::Ops ops; }
namespace neon { extern const puna::Ops ops; }
namespace plain { extern const puna::Ops ops; }

namespace puna {

std::vector<const Ops*> available() {
    std::vector<const Ops*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has512 = has2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (has512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::ops);
    if (has512) found.push_back(&avx512::ops);
    if (has2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avx2vnni::ops);
    if (has2) found.push_back(&avx2::ops);
#elif defined(__aarch64__)
#if defined(__linux__)
    constexpr unsigned long DOT = 1ul << 20;  // HWCAP_ASIMDDP
    if (getauxval(AT_HWCAP) & DOT) found.push_back(&neon::ops);
#else
    found.push_back(&neon::ops);  // every Apple processor with an arm64 system has them
#endif
#endif
    found.push_back(&plain::ops);
    return found;
}

namespace {
std::atomic<const Ops*> chosen{nullptr};
}

const Ops& operations() {
    if (!chosen.load(std::memory_order_relaxed)) chosen = available().front();
    return *chosen.load(std::memory_order_relaxed);
}

bool choose(const char* name) {
    for (const Ops* ops : available())
        if (!std::strcmp(ops->name, name)) return chosen = ops, true;
    return false;
}

}  // namespace puna
