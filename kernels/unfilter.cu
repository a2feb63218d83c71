// unfilter_chunks: join planes into chunks and take the digests of what was written, in one pass.
//
// The inverse of filter.cu, with its arguments, its table and its launch: here the planes are read
// and the tensors written.  A row's tensor may begin at any address.  The digests are of the joined
// bytes as they go to the tensor: equal to filter_chunks' exactly if the chunks are.
// References: join in gpuckpt/planes.py, fingerprint in gpuckpt/fingerprint.py.
//
// A warp takes 2 KiB at a time: four 16-byte loads a lane from the planes, through its own shared
// memory into units of the chunk; these feed the digest and go out in four 16-byte stores.  Where
// the tensor is misaligned each lane gets the next one's unit by shuffles, so that stores are
// aligned.
// Only a chunk's last tile, if it isn't full, and the ends of tiles of a misaligned tensor are
// moved bytewise.  Roofline and what could keep it from that: as filter.cu.
#include "chunks.cuh"
#include "xxh3.cuh"

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
    __syncwarp(ALL);
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

template <u32 WIDTH>
__device__ __forceinline__ void unfilter_leaf(const Leaf &leaf, const u8 *__restrict__ planes,
                                              u64 stride, uint4 *__restrict__ tile,
                                              u64 *__restrict__ sums) {
  const u32 lane = threadIdx.x % 32;
  const Keys keys = keys_of(lane);
  const u8 *from = planes + leaf.begin / WIDTH;
  u8 *tensor = reinterpret_cast<u8 *>(leaf.tensor);
  for (u32 at = threadIdx.x / 32 * TILE; at < leaf.padded; at += WARPS * TILE) {
    const u32 left = leaf.length - at, count = left < TILE ? left : TILE;
    load_planes<WIDTH>(from + at / WIDTH, stride, count / WIDTH, tile);
    __syncwarp(ALL);
    uint4 v[UNITS];
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) v[u] = join_unit<WIDTH>(u * 32 + lane, tile);
    digest_tile(v, keys, at / STRIPE, leaf.padded / STRIPE - 1, sums);
    store_tile(v, tensor + at, count, tile);
    __syncwarp(ALL);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
unfilter_chunks(const Chunk *__restrict__ chunks, u64 rows, u64 leaves,
                const u8 *__restrict__ staged, u64 *__restrict__ digests) {
  __shared__ uint4 tiles[WARPS][TILE / UNIT];
  __shared__ u64 sums[LEAF / BLOCK * LANES];
  uint4 *tile = tiles[threadIdx.x / 32];
  for (u64 at = blockIdx.x; at < leaves; at += gridDim.x) {
    const Chunk chunk = chunks[row_of(chunks, rows, at)];
    const Leaf leaf = leaf_of(chunk, at);
    const u8 *planes = staged + chunk.planes;
    switch (chunk.width) {
      case 1: unfilter_leaf<1>(leaf, planes, chunk.stride, tile, sums); break;
      case 2: unfilter_leaf<2>(leaf, planes, chunk.stride, tile, sums); break;
      case 4: unfilter_leaf<4>(leaf, planes, chunk.stride, tile, sums); break;
      case 8: unfilter_leaf<8>(leaf, planes, chunk.stride, tile, sums); break;
    }
    __syncthreads();
    if (threadIdx.x < 32) finish_digest(sums, leaf.padded, digests + 2 * at);
    __syncthreads();
  }
}
