// AVX-512 VNNI BF16.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "matrix.h"  // before the pragma: it is shared with other instruction sets
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,prfchw,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,prfchw,avx2,fma,f16c")
#endif
#define PUNA_NAMESPACE avx512bf16
#define PUNA_NAME "AVX-512 VNNI BF16"
#define PUNA_AVX512
#define PUNA_VNNI
#define PUNA_BF16
#include "instructions.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
