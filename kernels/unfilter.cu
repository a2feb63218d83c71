// unfilter_chunks: join planes into chunks and take the digests of what was written, in one pass.
//
// The inverse of filter.cu, with its table and its launch: here the planes are read and the tensors
// written.  Of a row, summaries, expected, values and kind aren't looked at.
//
//   chunks, rows, leaves, staged    as filter.cu has them; several rows may have the same planes
//   digests  two words a leaf, of all rows: the 16 bytes of its XXH3-128 digest, most significant
//            first, of the bytes as they go to the tensor
//
// A row's tensor and base may begin at any address.  The base may be the tensor itself: each of its
// bytes is read before it is written, by the same warp.  Else it overlaps nothing that is written.
// References: join in gpuckpt/planes.py, fingerprint in gpuckpt/fingerprint.py.
//
// A warp takes 2 KiB at a time: four 16-byte loads a lane from the planes, through its own shared
// memory into units of the chunk; these feed the digest and go out in four 16-byte stores.  Where
// the tensor is misaligned each lane gets the next one's unit by shuffles, so that stores are
// aligned.
// Only a chunk's last tile, if it isn't full, and the ends of tiles of a misaligned tensor are
// moved bytewise.  Roofline and what could keep it from that: as filter.cu, less the statistics; in
// sm_90's machine code a unit of an aligned full tile costs 94 instructions, and with a base 176.
#include "table.cuh"
#include "chunks.cuh"
#include "xxh3.cuh"
#include "block.cuh"
#include "delta.cuh"
#include "turn.cuh"

// Reads a tile's planes, of `count` bytes each, into `tile`; zeros after them.
template <u32 WIDTH>
__device__ __forceinline__ void load_planes(const u8 *__restrict__ from, u64 stride, u32 count,
                                            uint4 *__restrict__ tile) {
  constexpr u32 ROOM = TILE / WIDTH, ACROSS = ROOM / UNIT;
  const u32 lane = threadIdx.x % 32;
  if (count == ROOM) {
    uint4 v[UNITS];
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) {
      const u32 at = u * 32 + lane;
      v[u] = __ldcs(reinterpret_cast<const uint4 *>(from + at / ACROSS * stride) + at % ACROSS);
    }
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) tile[u * 32 + lane] = v[u];
  } else {
    u8 *bytes = reinterpret_cast<u8 *>(tile);
#pragma unroll 1
    for (u32 k = 0; k < WIDTH; ++k)
#pragma unroll 8
      for (u32 i = lane; i < ROOM; i += 32)
        bytes[k * ROOM + i] = i < count ? from[k * stride + i] : 0;
  }
}

// Unit `at` of a tile, out of the tile's planes, which follow each other.
template <u32 WIDTH> __device__ __forceinline__ uint4 join_unit(u32 at, const uint4 *tile);
template <> __device__ __forceinline__ uint4 join_unit<1>(u32 at, const uint4 *tile) {
  return tile[at];
}
template <> __device__ __forceinline__ uint4 join_unit<2>(u32 at, const uint4 *tile) {
  const uint2 *plane = reinterpret_cast<const uint2 *>(tile) + at;
  const uint2 a = plane[0], b = plane[TILE / 16];
  return make_uint4(__byte_perm(a.x, b.x, 0x5140), __byte_perm(a.x, b.x, 0x7362),
                    __byte_perm(a.y, b.y, 0x5140), __byte_perm(a.y, b.y, 0x7362));
}
template <> __device__ __forceinline__ uint4 join_unit<4>(u32 at, const uint4 *tile) {
  const u32 *plane = reinterpret_cast<const u32 *>(tile) + at;
  return transposed(make_uint4(plane[0], plane[TILE / 16], plane[TILE / 16 * 2],
                               plane[TILE / 16 * 3]));
}
template <> __device__ __forceinline__ uint4 join_unit<8>(u32 at, const uint4 *tile) {
  const u16 *plane = reinterpret_cast<const u16 *>(tile) + at;
  u32 pair[4];  // bytes 2 k and 2 k + 1 of one element, then of the other
#pragma unroll
  for (u32 k = 0; k < 4; ++k)
    pair[k] = __byte_perm(plane[TILE / 16 * 2 * k], plane[TILE / 16 * (2 * k + 1)], 0x5140);
  return make_uint4(__byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[2], pair[3], 0x5410),
                    __byte_perm(pair[0], pair[1], 0x7632), __byte_perm(pair[2], pair[3], 0x7632));
}

// What lane `from` gives.
__device__ __forceinline__ uint4 given(uint4 v, u32 from) {
  return make_uint4(__shfl_sync(ALL, v.x, from), __shfl_sync(ALL, v.y, from),
                    __shfl_sync(ALL, v.z, from), __shfl_sync(ALL, v.w, from));
}

// Writes a full tile to a misaligned address: 127 aligned units, of two lanes' bytes each, m bytes
// before and 16 - m behind them.
__device__ __forceinline__ void store_misaligned(const uint4 *v, u8 *__restrict__ to) {
  const u32 lane = threadIdx.x % 32, m = (u32)(-(u64)to % UNIT);
  uint4 *aligned = reinterpret_cast<uint4 *>(to + m) + lane;
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) {
    const uint4 next = given(lane ? v[u] : v[(u + 1) % UNITS], (lane + 1) % 32);
    if (u + 1 < UNITS || lane < 31) __stcs(aligned + u * 32, window(v[u], next, m));
  }
  const uint4 end = given(lane ? v[UNITS - 1] : v[0], lane < m ? 0 : 31);
  const u32 low = lane & 4 ? end.y : end.x, high = lane & 4 ? end.w : end.z;
  const u8 byte = (u8)((lane & 8 ? high : low) >> lane % 4 * 8);
  if (lane < UNIT) __stcs(to + (lane < m ? lane : TILE - UNIT + lane), byte);
}

// Writes the first `count` bytes of the tile whose units the lanes hold.  May use `tile`.
__device__ __forceinline__ void store_tile(const uint4 *v, u8 *__restrict__ to, u32 count,
                                           uint4 *__restrict__ tile) {
  const u32 lane = threadIdx.x % 32;
  if (count < TILE) {
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) tile[u * 32 + lane] = v[u];
    __syncwarp(ALL);
    const u8 *bytes = reinterpret_cast<const u8 *>(tile);
#pragma unroll 4
    for (u32 i = lane; i < count; i += 32) __stcs(to + i, bytes[i]);
  } else if ((u64)to % UNIT) {
    store_misaligned(v, to);
  } else {
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) __stcs(reinterpret_cast<uint4 *>(to) + u * 32 + lane, v[u]);
  }
}

// A tile out of its planes.  Uses `tile`, whose earlier contents are done with.
template <u32 WIDTH>
__device__ __forceinline__ void take_planes(const u8 *__restrict__ planes, u64 begin, u64 stride,
                                            u32 count, uint4 *__restrict__ tile, uint4 *v) {
  load_planes<WIDTH>(planes + begin / WIDTH, stride, count / WIDTH, tile);
  __syncwarp(ALL);
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) v[u] = join_unit<WIDTH>(u * 32 + threadIdx.x % 32, tile);
  __syncwarp(ALL);
}

// A warp's tiles of a leaf.
__device__ __forceinline__ void unfilter_tiles(Block &block, const u8 *__restrict__ staged) {
  uint4 *tile = block.tile();
  const Chunk &row = block.row;
  const Leaf &leaf = block.leaf;
  for (u32 in = threadIdx.x / 32 * TILE; in < leaf.padded; in += WARPS * TILE) {
    const u64 begin = leaf.begin + in;
    const u32 count = bytes_of(leaf, in);
    const u8 *planes = staged + row.planes;
    uint4 v[UNITS];
    switch (row.width) {
      case 1: take_planes<1>(planes, begin, row.stride, count, tile, v); break;
      case 2: take_planes<2>(planes, begin, row.stride, count, tile, v); break;
      case 4: take_planes<4>(planes, begin, row.stride, count, tile, v); break;
      case 8: take_planes<8>(planes, begin, row.stride, count, tile, v); break;
    }
    if (row.turned) turn_tile<true>(row.width, v);
    if (row.base)
      shift_tile<true>(reinterpret_cast<const u8 *>(row.base + begin), count, row.width, tile, v);
    digest_tile(v, block.keys, in / STRIPE, leaf.padded / STRIPE - 1, block.sums);
    store_tile(v, reinterpret_cast<u8 *>(row.tensor + begin), count, tile);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
unfilter_chunks(const Chunk *__restrict__ chunks, u64 rows, u64 leaves,
                const u8 *__restrict__ staged, u64 *__restrict__ digests) {
  __shared__ Block block;
  begin_block(block);
  for (u64 at = blockIdx.x; at < leaves;) {
    begin_leaf(block, chunks, rows, at);
    unfilter_tiles(block, staged);
    const Leaf &leaf = block.leaf;
    __syncthreads();
    if (threadIdx.x < 32)
      write_digest(block.sums, block.keys, leaf.padded, digests + 2 * leaf.number);
    at = block.leaf.number + gridDim.x;
    __syncthreads();
  }
}
