// C++ for any processor.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "matrix.h"  // before the pragma: it is shared with other instruction sets
#define PUNA_NAMESPACE plain
#define PUNA_NAME "plain C++"
#define PUNA_PLAIN
#include "instructions.h"
