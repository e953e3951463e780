// NEON with dot products.
#if defined(__aarch64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "matrix.h"  // before the pragma: it is shared with other instruction sets
#if !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+dotprod+fp16")
#endif
#define PUNA_NAMESPACE neon
#define PUNA_NAME "NEON"
#define PUNA_NEON
#include "instructions.h"
#endif
