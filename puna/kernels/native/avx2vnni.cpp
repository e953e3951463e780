// AVX2 VNNI.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "matrix.h"  // before the pragma: it is shared with other instruction sets
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define PUNA_NAMESPACE avx2vnni
#define PUNA_NAME "AVX2 VNNI"
#define PUNA_AVX2
#define PUNA_VNNI
#include "instructions.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
