// sample_deltas: histograms of some elements' bytes, and of those of their differences.
//
//   pairs  rows of pairs.cuh on the device, 16-aligned; first_piece, found, out and sparse aren't
//          looked at; histograms are 4-aligned, count / every is below 65535
//   rows   how many
//
// Of a row the elements 0, every, 2 every, ... are looked at.  Of these
// histograms[(side * width + k) * 256 + v] becomes the number of those whose byte k is v: for side
// 0 as they were before they were copied, so not turned, for side 1 of their differences from the
// copy before.  Nothing else is written, nothing but these elements read.
// Launch: 256 threads a block, any grid; best is a block a row.
// Reference: delta_pays in gpuckpt/deltacoding.py, which takes the same elements.
//
// A row costs some 4096 elements, whose bytes lie in sectors of 32 bytes of their own: 128 KiB for
// each plane of both copies, of 2 MiB with the usual chunks of 4 MiB and 2-byte elements.  All this
// is arithmetic: nothing has been measured on a GPU.
#include "table.cuh"
#include "chunks.cuh"
#include "delta.cuh"
#include "turn.cuh"
#include "pairs.cuh"

// An element of up to 4 bytes, or of 8, out of its planes, as it was before it was turned.
template <class Element> __device__ __forceinline__ Element element_at(u64 plane, u64 stride,
                                                                       u32 width, bool is_turned) {
  Element element = 0;
  for (u32 k = 0; k < width; ++k)
    element |= (Element)__ldcs(reinterpret_cast<const u8 *>(plane + k * stride)) << 8 * k;
  return is_turned ? (Element)turned<true>((u32)element, width) : element;
}
__device__ __forceinline__ u32 less_one(u32 a, u32 b, u32 width) {
  return folded(fields_of(width), a, b);
}
__device__ __forceinline__ u64 less_one(u64 a, u64 b, u32) { return folded(a, b); }

template <class Element>
__device__ __forceinline__ void count_samples(const Pair &pair, u32 (*counts)[256]) {
  const u32 width = pair.width;
  for (u64 at = (u64)threadIdx.x * pair.every; at < pair.count; at += (u64)THREADS * pair.every) {
    const Element now = element_at<Element>(pair.now + at, pair.stride, width, pair.turned);
    const Element before = element_at<Element>(pair.before + at, pair.stride, width, pair.turned);
    const Element less = less_one(now, before, width);
    for (u32 k = 0; k < width; ++k) {
      atomicAdd(&counts[k][now >> 8 * k & 255], 1u);
      atomicAdd(&counts[width + k][less >> 8 * k & 255], 1u);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
sample_deltas(const Pair *__restrict__ pairs, u64 rows) {
  __shared__ u32 counts[16][256];
  for (u64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const Pair &pair = pairs[row];
    for (u32 k = 0; k < 2 * pair.width; ++k) counts[k][threadIdx.x] = 0;
    __syncthreads();
    if (pair.width < 8)
      count_samples<u32>(pair, counts);
    else
      count_samples<u64>(pair, counts);
    __syncthreads();
    u32 *to = reinterpret_cast<u32 *>(pair.histograms);
    for (u32 at = threadIdx.x; at < 256 * pair.width; at += THREADS) {
      const u32 k = at / 128, v = at % 128 * 2;
      __stcs(to + at, counts[k][v] | counts[k][v + 1] << 16);
    }
    __syncthreads();
  }
}
