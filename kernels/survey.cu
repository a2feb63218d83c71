// survey_deltas: how many bytes of each plane of differences aren't zero, segment by segment.
//
//   pairs   rows of pairs.cuh on the device, 16-aligned; first_piece ascends from 0; every,
//           histograms, out and sparse aren't looked at
//   rows    how many, at least 1
//   pieces  of all rows: the sum of count / 32768, each rounded up
//
// Of a row found[s * width + k] becomes the number of bytes that aren't zero in segment s of plane
// k of the differences: the planes that filter.cu would write of the one copy with the other as its
// base.  Nothing else is written; of the copies only their planes are read, each up to a multiple
// of 4 bytes.
// Launch: 256 threads a block, any grid; best is a block a piece.
// Reference: delta_split in gpuckpt/deltas.py, count_nonzero in gpuckpt/sparse.py.
//
// Roofline: each byte of both copies is read once: 0.60 ms a GB of state at an H100's 3.35 TB/s.
// A lane reads 4 bytes of a plane at a time, a warp 128 in a row.  All this is arithmetic: nothing
// has been measured on a GPU.
#include "table.cuh"
#include "chunks.cuh"
#include "delta.cuh"
#include "turn.cuh"
#include "pairs.cuh"

struct Survey {
  template <u32 WIDTH>
  __device__ __forceinline__ static void segment(const Pair &pair, u64 segment) {
    const u32 lane = threadIdx.x % 32;
    const u64 first = segment * SEGMENT + lane * 4, end = (segment + 1) * SEGMENT;
    u32 totals[WIDTH] = {};
#pragma unroll (8 / WIDTH)
    for (u64 at = first; at < end && at < pair.count; at += STEP) {
      const Words<WIDTH> d = differences<WIDTH>(pair, at);
#pragma unroll
      for (u32 k = 0; k < WIDTH; ++k) totals[k] += __popc(set_bits(d.w[k]));
    }
    __syncwarp(ALL);
    u32 *found = reinterpret_cast<u32 *>(pair.found) + segment * WIDTH;
#pragma unroll
    for (u32 k = 0; k < WIDTH; ++k) {
#pragma unroll
      for (u32 step = 16; step; step /= 2) totals[k] += __shfl_xor_sync(ALL, totals[k], step);
      if (lane == k) __stcs(found + k, totals[k]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
survey_deltas(const Pair *__restrict__ pairs, u64 rows, u64 pieces) {
  take_pieces<Survey>(pairs, rows, pieces);
}
