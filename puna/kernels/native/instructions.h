// The table of one instruction set; included by a file per set, which says what may be used.

#include "attention.h"
#include "encode.h"
#include "multiply.h"
#include "sampling.h"

namespace PUNA_NAMESPACE {

inline void rotate_head(float* x, const float* turns, int64_t width) { rotate(x, turns, width); }

extern const puna::Ops ops;
const puna::Ops ops = {
    PUNA_NAME, TILE_Q, TILE_F, multiply, swiglu, gate, prepare, rms_norm, rotate_head, write, attend, attend_scratch, embed, encode, top,
};

}  // namespace PUNA_NAMESPACE
