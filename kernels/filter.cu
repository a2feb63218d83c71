// filter_chunks: split chunks into planes and take the digests of their leaves, in one pass.
//
//   chunks   rows of chunks.cuh on the device, 16-aligned; first_leaf ascends from 0
//   rows     how many, at least 1
//   leaves   of all rows: the sum of nbytes / 64 KiB, each rounded up
//   staged   16-aligned; plane k of a row goes to staged[row.planes + k * row.stride ...], which
//            gets nbytes / width bytes; what lies between planes stays as it is
//   digests  two words a leaf: the 16 bytes of its XXH3-128 digest, most significant first
//
// Tensors may begin at any address, and nbytes is a multiple of width.  Nothing but the rows' bytes
// is read and nothing else written; the areas don't overlap, and nobody changes them meanwhile.
// Launch: 256 threads a block, any grid; best is a block a leaf.
// References: split in gpuckpt/planes.py, fingerprint in gpuckpt/fingerprint.py, whose root, over
// digests and length, is the host's.  Inverse: unfilter.cu.
//
// A warp takes 2 KiB at a time: four 16-byte loads a lane, which feed the digest from registers and
// go through the warp's own shared memory into planes; then four 16-byte stores.  A misaligned
// tensor costs a second load of the same lines, out of the first-level cache.  Only a chunk's last
// tile, if it isn't full, and of a misaligned tensor the first and last are moved bytewise.
//
// Roofline: each byte is read once and written once; 48 bytes of table and 16 of digest come to a
// leaf.  At an H100's 3.35 TB/s that is 0.60 ms a GB, or 39 ns a leaf.  A unit of 16 bytes may then
// cost some 270 instructions of a thread (132 SMs x 128 lanes x 1.7 GHz); it takes fewer than 150,
// in sm_90's machine code with the paths counted that aren't taken.  So it isn't the instructions
// that could stop it, but latency:
// 64 registers a thread leave half of an SM's threads, 1024, which have up to 64 KiB of loads in
// flight where 9 KiB would cover 0.7 us; and while one warp runs a leaf's chain (about 1 us), the
// SM's three other blocks must fill in.  Fewer than some 500 leaves (32 MB) don't fill the GPU.
// All this is arithmetic: nothing has been measured on a GPU yet.
#include "chunks.cuh"
#include "xxh3.cuh"

// This lane's units of the tile `at` bytes into the leaf; zeros from the leaf's end on.  May use
// `tile`.
__device__ __forceinline__ void load_tile(const Leaf &leaf, u32 at, uint4 *__restrict__ tile,
                                          uint4 *v) {
  const u8 *tensor = reinterpret_cast<const u8 *>(leaf.tensor);
  const u32 lane = threadIdx.x % 32, m = leaf.tensor % UNIT;
  const uint4 *from = reinterpret_cast<const uint4 *>(tensor + at - m) + lane;
  if (m == 0 && at + TILE <= leaf.length) {
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) v[u] = __ldcs(from + u * 32);
  } else if (leaf.begin + at >= m && at + TILE + UNIT <= leaf.length + leaf.follows + m) {
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u)
      v[u] = window(__ldcs(from + u * 32), __ldcs(from + u * 32 + 1), m);
  } else {
    u8 *bytes = reinterpret_cast<u8 *>(tile);
#pragma unroll 8
    for (u32 i = lane; i < TILE; i += 32)
      bytes[i] = at + i < leaf.length ? __ldcs(tensor + at + i) : 0;
    __syncwarp(ALL);
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) v[u] = tile[u * 32 + lane];
    __syncwarp(ALL);
  }
}

// Puts unit `at` of a tile into the tile's planes, which follow each other.
template <u32 WIDTH> __device__ __forceinline__ void split_unit(uint4 v, u32 at, uint4 *tile);
template <> __device__ __forceinline__ void split_unit<1>(uint4 v, u32 at, uint4 *tile) {
  tile[at] = v;
}
template <> __device__ __forceinline__ void split_unit<2>(uint4 v, u32 at, uint4 *tile) {
  uint2 *plane = reinterpret_cast<uint2 *>(tile) + at;
  plane[0] = make_uint2(__byte_perm(v.x, v.y, 0x6420), __byte_perm(v.z, v.w, 0x6420));
  plane[TILE / 16] = make_uint2(__byte_perm(v.x, v.y, 0x7531), __byte_perm(v.z, v.w, 0x7531));
}
template <> __device__ __forceinline__ void split_unit<4>(uint4 v, u32 at, uint4 *tile) {
  u32 *plane = reinterpret_cast<u32 *>(tile) + at;
  const uint4 words = transposed(v);
  plane[0] = words.x;
  plane[TILE / 16] = words.y;
  plane[TILE / 16 * 2] = words.z;
  plane[TILE / 16 * 3] = words.w;
}
template <> __device__ __forceinline__ void split_unit<8>(uint4 v, u32 at, uint4 *tile) {
  u16 *plane = reinterpret_cast<u16 *>(tile) + at;
#pragma unroll
  for (u32 k = 0; k < 4; ++k) {
    plane[TILE / 16 * k] = (u16)__byte_perm(v.x, v.z, 0x40 + 0x11 * k);
    plane[TILE / 16 * (k + 4)] = (u16)__byte_perm(v.y, v.w, 0x40 + 0x11 * k);
  }
}

// Writes a tile's planes, of `count` bytes each, to where they go on.
template <u32 WIDTH>
__device__ __forceinline__ void store_planes(const uint4 *__restrict__ tile, u8 *__restrict__ to,
                                             u64 stride, u32 count) {
  constexpr u32 ROOM = TILE / WIDTH, ACROSS = ROOM / UNIT;
  const u32 lane = threadIdx.x % 32;
  if (count == ROOM) {
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) {
      const u32 at = u * 32 + lane;
      reinterpret_cast<uint4 *>(to + at / ACROSS * stride)[at % ACROSS] = tile[at];
    }
  } else {
    const u8 *bytes = reinterpret_cast<const u8 *>(tile);
#pragma unroll 1
    for (u32 k = 0; k < WIDTH; ++k)
#pragma unroll 4
      for (u32 i = lane; i < count; i += 32) to[k * stride + i] = bytes[k * ROOM + i];
  }
}

template <u32 WIDTH>
__device__ __forceinline__ void filter_leaf(const Leaf &leaf, u8 *__restrict__ planes, u64 stride,
                                            uint4 *__restrict__ tile, u64 *__restrict__ sums) {
  const u32 lane = threadIdx.x % 32;
  const Keys keys = keys_of(lane);
  u8 *to = planes + leaf.begin / WIDTH;
  for (u32 at = threadIdx.x / 32 * TILE; at < leaf.padded; at += WARPS * TILE) {
    const u32 left = leaf.length - at;
    uint4 v[UNITS];
    load_tile(leaf, at, tile, v);
    digest_tile(v, keys, at / STRIPE, leaf.padded / STRIPE - 1, sums);
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) split_unit<WIDTH>(v[u], u * 32 + lane, tile);
    __syncwarp(ALL);
    store_planes<WIDTH>(tile, to + at / WIDTH, stride, (left < TILE ? left : TILE) / WIDTH);
    __syncwarp(ALL);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
filter_chunks(const Chunk *__restrict__ chunks, u64 rows, u64 leaves, u8 *__restrict__ staged,
              u64 *__restrict__ digests) {
  __shared__ uint4 tiles[WARPS][TILE / UNIT];
  __shared__ u64 sums[LEAF / BLOCK * LANES];
  uint4 *tile = tiles[threadIdx.x / 32];
  for (u64 at = blockIdx.x; at < leaves; at += gridDim.x) {
    const Chunk chunk = chunks[row_of(chunks, rows, at)];
    const Leaf leaf = leaf_of(chunk, at);
    u8 *planes = staged + chunk.planes;
    switch (chunk.width) {
      case 1: filter_leaf<1>(leaf, planes, chunk.stride, tile, sums); break;
      case 2: filter_leaf<2>(leaf, planes, chunk.stride, tile, sums); break;
      case 4: filter_leaf<4>(leaf, planes, chunk.stride, tile, sums); break;
      case 8: filter_leaf<8>(leaf, planes, chunk.stride, tile, sums); break;
    }
    __syncthreads();
    if (threadIdx.x < 32) finish_digest(sums, leaf.padded, digests + 2 * at);
    __syncthreads();
  }
}
