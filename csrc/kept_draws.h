// Normals of the adapters' noise that are asked for again and again, kept between calls: a text is
// generated token by token under one key, and drawing r n normals costs as much as all else that a
// token takes. Torch-free, and compiled once, unlike the kernels.
#pragma once

#include <memory>

#include "core/philox.h"

namespace bayes_kernels {

// The first `count` normals of the draw (key, stream), or null where the caller has to draw. What
// is kept is found by all that determines it (the subkey of key and stream, the count, the rounding
// mode), so that it is never out of date, and results are the same bits with and without it.
//
// The first call of a draw takes note of it only, the second keeps its numbers: noise that is new
// in each call takes no memory. At most a number of bytes is kept (64 MiB, or the MiB that the
// environment variable BAYES_KERNELS_KEPT_DRAWS says; 0 keeps nothing), and the draw that was used
// least recently goes first. For any number of threads; a call never waits for another one, nor for
// one that was interrupted by a fork.
std::shared_ptr<const float> kept_normals(const int64_t* key, int64_t stream, int64_t count);

}  // namespace bayes_kernels
