// pack_deltas: planes of differences, those of which few bytes aren't zero as a bitmap and these.
//
//   pairs   rows of pairs.cuh on the device, 16-aligned; first_piece ascends from 0; every and
//           histograms aren't looked at
//   rows    how many, at least 1
//   pieces  of all rows: the sum of count / 32768, each rounded up
//
// Plane k of a row's differences goes to out[k]: as it is, or if bit k of `sparse` is set, as the
// bitmap and the bytes of gpuckpt/sparse.py.  Then found[2 * (s * width + k)] says where in out[k]
// the bytes of segment s begin, and the number after it where its 512 bytes of bitmap do: for a
// segment without such bytes 2^32 - 1, and nothing is written.  The last word of a bitmap and of a
// plane is filled up with zeros, so that up to 3 bytes behind them are written; nothing else is.
// What is written overlaps nothing.
// Launch: 256 threads a block, any grid; best is a block a piece.
// Reference: delta_split in gpuckpt/deltas.py, pack_sparse in gpuckpt/sparse.py.
//
// Bytes find their places by ballots within a warp, and by sums over segments between warps, which
// the host makes of what survey.cu counted.
//
// Roofline: each byte of both copies is read once, as in survey.cu, and little is written where
// planes are sparse: 0.60 ms a GB of state at an H100's 3.35 TB/s.  All this is arithmetic: nothing
// has been measured on a GPU.
#include "table.cuh"
#include "chunks.cuh"
#include "delta.cuh"
#include "turn.cuh"
#include "pairs.cuh"

constexpr u32 NONE = ~0u;

// Writes a word's bytes that aren't zero behind those of lower lanes; how many the warp has.
__device__ __forceinline__ u32 pack_bytes(u32 word, u32 set, u8 *to) {
  const u32 below = (1u << threadIdx.x % 32) - 1;
  u32 rank = 0, total = 0;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) {
    const u32 lanes = __ballot_sync(ALL, set >> j & 1);
    rank += __popc(lanes & below);
    total += __popc(lanes);
  }
#pragma unroll
  for (u32 j = 0; j < 4; ++j)
    if (set >> j & 1) __stcs(to + rank++, (u8)(word >> 8 * j));
  return total;
}

// Writes which bytes of a warp's words aren't zero: 16 bytes, of which the first `bits` bits count.
__device__ __forceinline__ void write_bitmap(u32 set, u64 bits, u32 *to) {
  const u32 lane = threadIdx.x % 32;
  u32 word = set << lane % 8 * 4;
#pragma unroll
  for (u32 step = 1; step < 8; step *= 2) word |= __shfl_xor_sync(ALL, word, step);
  if (lane % 8 == 0 && lane * 4 < bits) __stcs(to + lane / 8, word);
}

struct Pack {
  template <u32 WIDTH>
  __device__ __forceinline__ static void segment(const Pair &pair, u64 segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 *found = reinterpret_cast<const u32 *>(pair.found) + segment * WIDTH * 2;
    const u64 begin = segment * SEGMENT;
    u32 starts[WIDTH];
#pragma unroll
    for (u32 k = 0; k < WIDTH; ++k) starts[k] = __ldcs(found + 2 * k);
#pragma unroll 1
    for (u32 in = 0; in < SEGMENT && begin + in < pair.count; in += STEP) {
      const u64 first = begin + in, at = first + lane * 4;
      Words<WIDTH> d = {};
      if (at < pair.count) d = differences<WIDTH>(pair, at);
      __syncwarp(ALL);
#pragma unroll
      for (u32 k = 0; k < WIDTH; ++k) {
        const u64 out = pair.out[k];
        if (pair.sparse >> k & 1) {
          const u32 bitmap = __ldg(found + 2 * k + 1), set = set_bits(d.w[k]);
          if (bitmap == NONE) continue;
          write_bitmap(set, pair.count - first, reinterpret_cast<u32 *>(out + bitmap) + in / 32);
          starts[k] += pack_bytes(d.w[k], set, reinterpret_cast<u8 *>(out) + starts[k]);
        } else if (at < pair.count) {
          __stcs(reinterpret_cast<u32 *>(out + at), d.w[k]);
        }
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
pack_deltas(const Pair *__restrict__ pairs, u64 rows, u64 pieces) {
  take_pieces<Pack>(pairs, rows, pieces);
}
