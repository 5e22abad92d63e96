// The CPU algorithm, once for every instruction set. A file of an instruction set defines its vectors in a namespace of its own
// and then includes this one inside that namespace.
//
// A task owns a group of an image (or some rows of it). It packs the rows of the value map that its taps reach into a map, of
// the compute type or of what channels.h lets stand for it, with zero cells all round, so that no tap needs a bounds test and
// neighbouring cells lie in neighbouring cache lines. Positions, corner weights and cell indices of all taps of a pixel are
// computed one tap a lane; then each tap is four weighted loads a vector of channels. Backward adds into a second packed map
// that the task alone owns: no atomics, the same sums in the same order every time.
//
// With 3x3 kernels the vectors that say `looks_up` go another way (lookup.h): the taps of many pixels are located together,
// nine vectors for as many pixels as a vector has lanes, and each of the passes that follow has its constants in registers.
//
// A vector type V has: width, Scalar, Mask; set1, zero, load, load_some, store, store_some, pairs, store_pairs, quads, fma,
// floor, first_lanes, greater (among the lanes of a mask), any, select, store_cells, sum4, prefetch (into the L1 cache) and
// prefetch_l2, operators + - *; where `looks_up` is true also all_pairs, permute, store_whole, either, least, greatest, lane,
// power_of_two, stream (a store past the caches), store_two, fence; Weights, weights and spread (one of a pixel's weights over
// all lanes, out of registers), permuted (how many of the four corners' weights forward takes so); `sorts`: whether backward
// can go by cells (cells.h), with store_quads, sum_blocks and a store_whole for lanes that are not used. kUnrollTaps asks for
// kernels with the nine taps of a 3x3 kernel unrolled, which pays where the taps' weights can stay in registers.

// In the order in which they need each other.
#include "channels.h"

#include "taps.h"

#include "packing.h"
#include "tasks.h"

#include "lookup.h"

#include "forward.h"

#include "cells.h"

#include "backward.h"

namespace {

template <class F32, class F64>
int32_t forward_any(const dcnv4_problem& p, const void* value, const void* offset_mask, void* output) {
  switch (p.dtype) {
    case DCNV4_FLOAT32:
      return forward<F32, float>(p, value, offset_mask, output);
    case DCNV4_FLOAT64:
      return forward<F64, double>(p, value, offset_mask, output);
    case DCNV4_BFLOAT16:
      return forward<F32, bf16>(p, value, offset_mask, output);
    case DCNV4_FLOAT16:
      return forward<F32, f16>(p, value, offset_mask, output);
    default:
      return DCNV4_NO_KERNEL;
  }
}

template <class F32, class F64, bool kByCells = false>
int32_t backward_any(const dcnv4_problem& p, const void* value, const void* offset_mask, const void* grad_output,
                     void* grad_value, void* grad_offset_mask) {
  switch (p.dtype) {
    case DCNV4_FLOAT32:
      return backward<F32, float>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask, kByCells);
    case DCNV4_FLOAT64:
      return backward<F64, double>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask);
    case DCNV4_BFLOAT16:
      return backward<F32, bf16>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask, kByCells);
    case DCNV4_FLOAT16:
      return backward<F32, f16>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask, kByCells);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace
