// AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "matrix.h"  // before the pragma: it is shared with other instruction sets
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define PUNA_NAMESPACE avx2
#define PUNA_NAME "AVX2"
#define PUNA_AVX2
#include "instructions.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
