// The table of one instruction set; included by a file per set, which says what may be used.

#include "attention.h"
#include "encode.h"
#include "multiply.h"
#include "sampling.h"
#include "training.h"
#include "training_attention.h"

namespace PUNA_NAMESPACE {

inline void rotate_head(float* x, const float* turns, int64_t width) { rotate(x, turns, width); }

const puna::TrainingOps training = {
    train_norm, train_norm_back, train_turn, train_softmax, train_softmax_back, train_swiglu, train_swiglu_back, train_loss,
    train_pack, train_product, train_outer_scratch, train_outer, train_attend_scratch, train_attend, train_attend_back,
};

extern const puna::Ops ops;
const puna::Ops ops = {
    PUNA_NAME, TILE_Q, TILE_F, multiply, swiglu, gate, prepare, rms_norm, rotate_head, write, attend, attend_scratch, embed, refine, maxima, pack, encode, top, &training,
};

}  // namespace PUNA_NAMESPACE
