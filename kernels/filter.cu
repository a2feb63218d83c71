// filter_chunks: split chunks into planes, take the digests of their leaves and their statistics,
// in one pass; with a base, planes of the difference from it.
//
//   chunks   rows of chunks.cuh on the device, 16-aligned; first_leaf ascends from 0
//   rows     how many, at least 1
//   leaves   of all rows: the sum of nbytes / 64 KiB, each rounded up
//   staged   16-aligned; plane k of a row goes to staged[row.planes + k * row.stride ...], which
//            gets nbytes / width bytes, and the row's leaves' summaries (statistics.cuh), 80 bytes
//            each, to staged[row.summaries ...]; what lies between stays as it is
//
// Tensors and bases may begin at any address, and nbytes is a multiple of width.  Nothing but the
// rows' bytes, bases, values and expected digests is read and nothing else written; what is written
// overlaps nothing, and nobody changes what is read meanwhile.
// With a base of as many bytes, planes are of the folded differences of delta.cuh; digest, NaNs,
// infinities and squares are the tensor's all the same, and zero bytes those of the planes.
// Planes of a row that is `turned` are of elements (or differences) turned as turn.cuh says.
// Launch: 256 threads a block, any grid; best is a block a leaf.
// References: split in gpuckpt/planes.py, statistics_of in gpuckpt/statistics.py, fingerprint in
// gpuckpt/fingerprint.py, whose root, over digests and length, is the host's.  Inverse:
// unfilter.cu.
//
// A warp takes 2 KiB at a time: four 16-byte loads a lane, which feed digest and statistics from
// registers and go through the warp's own shared memory into planes; then four 16-byte stores.  A
// misaligned tensor costs a second load of the same lines, out of the first-level cache.  Only a
// chunk's last tile, if it isn't full, and a few bytes of misaligned ones are moved bytewise.
//
// Roofline: each byte is read once and written once, the base's read once; 80 bytes of table and 80
// of summary come to a leaf.  At an H100's 3.35 TB/s that is 0.60 ms a GB, or 39 ns a leaf, and
// with a base 0.90 ms and 59 ns.  A unit of 16 bytes may then cost some 270 instructions of a
// thread, or 400 with a base (132 SMs x 128 lanes x 1.7 GHz).  In sm_90's machine code aligned full
// tiles cost, without a base, 134 for kind 0, and at most 178 for kinds 1 to 4 (a part of which is
// the slow way, counted as if taken); the base adds 45 to 90.  Kind 5 comes to some 210.  So it
// isn't the instructions that could stop it, but
// - latency: 64 registers a thread leave half of an SM's threads, 1024, which have up to 64 KiB of
//   loads in flight where 9 KiB would cover 0.7 us; and while one warp runs a leaf's chain (about
//   1 us), the SM's three other blocks must fill in.  Fewer than some 500 leaves (32 MB) don't fill
//   the GPU.
// - kind 5: 16 look-ups a unit, which take from 16 to 128 cycles of an SM's first-level cache for a
//   warp's 32 units, where 68 are to be had; bytes that are spread evenly would halve the speed.
// - elements that aren't finite, and sums of squares that are tiny: some 50 instructions a unit
//   more of float32, 100 of two-byte and 250 of one-byte floats, in warps that have such.
// - float64 where it is slow (GeForce: 1/64): kind 4 takes 8 operations of it a lane and tile, all
//   others 2.
// All this is arithmetic: nothing has been measured on a GPU.
#include "table.cuh"
#include "chunks.cuh"
#include "xxh3.cuh"
#include "block.cuh"
#include "statistics.cuh"
#include "delta.cuh"
#include "turn.cuh"

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
      __stcs(reinterpret_cast<uint4 *>(to + at / ACROSS * stride) + at % ACROSS, tile[at]);
    }
  } else {
    const u8 *bytes = reinterpret_cast<const u8 *>(tile);
#pragma unroll 1
    for (u32 k = 0; k < WIDTH; ++k)
#pragma unroll 4
      for (u32 i = lane; i < count; i += 32) __stcs(to + k * stride + i, bytes[k * ROOM + i]);
  }
}

// Puts a tile, of which `count` bytes are there, into planes.
template <u32 WIDTH>
__device__ __forceinline__ void put_planes(const uint4 *v, uint4 *__restrict__ tile,
                                           u8 *__restrict__ planes, u64 begin, u64 stride,
                                           u32 count) {
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) split_unit<WIDTH>(v[u], u * 32 + threadIdx.x % 32, tile);
  __syncwarp(ALL);
  store_planes<WIDTH>(tile, planes + begin / WIDTH, stride, count / WIDTH);
}

// A warp's tiles of a leaf.
__device__ __forceinline__ void filter_tiles(Block &block, Counts &counts,
                                             u8 *__restrict__ staged) {
  uint4 *tile = block.tile();
  const Chunk &row = block.row;
  const Leaf &leaf = block.leaf;
  double squares = 0;
  counts.set[threadIdx.x] = make_uint2(0, 0);
  for (u32 in = threadIdx.x / 32 * TILE; in < leaf.padded; in += WARPS * TILE) {
    const u64 begin = leaf.begin + in;
    const u32 count = bytes_of(leaf, in);
    const float *values = reinterpret_cast<const float *>(row.values);
    uint4 v[UNITS];
    load_tile(reinterpret_cast<const u8 *>(row.tensor + begin), count, tile, v);
    digest_tile(v, block.keys, in / STRIPE, leaf.padded / STRIPE - 1, block.sums);
    add_statistics(v, row.kind, values, count, tile, squares, counts.strange);
    __syncwarp(ALL);
    if (row.base)
      shift_tile<false>(reinterpret_cast<const u8 *>(row.base + begin), count, row.width, tile, v);
    if (row.turned) turn_tile<false>(row.width, v);
    count_bytes(v, counts.set[threadIdx.x]);
    u8 *planes = staged + row.planes;
    switch (row.width) {
      case 1: put_planes<1>(v, tile, planes, begin, row.stride, count); break;
      case 2: put_planes<2>(v, tile, planes, begin, row.stride, count); break;
      case 4: put_planes<4>(v, tile, planes, begin, row.stride, count); break;
      case 8: put_planes<8>(v, tile, planes, begin, row.stride, count); break;
    }
    __syncwarp(ALL);
  }
  *reinterpret_cast<double *>(&tile[threadIdx.x % 32]) = squares;
}

// Finishes the digest, by the block's first warp, and sees whether it is the expected one.
__device__ __forceinline__ void write_outcome(Block &block,
                                              const u64 *__restrict__ expected,
                                              Summary *__restrict__ summary) {
  const u32 lane = threadIdx.x;
  const u64 word = finish_digest(block.sums, block.keys, block.leaf.padded);
  if (lane < 2) summary->digest[lane] = word;
  const bool other = lane < 2 && (!expected || __ldcs(expected + lane) != word);
  const u32 unchanged = !__any_sync(ALL, other);
  if (lane == 0) *reinterpret_cast<uint4 *>(&summary->unchanged) = make_uint4(unchanged, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
filter_chunks(const Chunk *__restrict__ chunks, u64 rows, u64 leaves, u8 *__restrict__ staged) {
  __shared__ Block block;
  __shared__ Counts counts;
  begin_block(block);
  for (u64 at = blockIdx.x; at < leaves;) {
    if (threadIdx.x < 2) counts.strange[threadIdx.x] = 0;
    begin_leaf(block, chunks, rows, at);
    filter_tiles(block, counts, staged);
    __syncthreads();
    const Chunk &row = block.row;
    const Leaf &leaf = block.leaf;
    const u64 index = leaf.number - row.first_leaf;
    Summary *summary = reinterpret_cast<Summary *>(staged + row.summaries) + index;
    if (threadIdx.x / 32 == 0) {
      const u64 *expected = reinterpret_cast<const u64 *>(row.expected);
      write_outcome(block, expected ? expected + 2 * index : 0, summary);
    }
    if (threadIdx.x / 32 == 1)
      write_statistics(block.tiles, counts, row.width, leaf.length / row.width, summary);
    at = leaf.number + gridDim.x;
    __syncthreads();
  }
}
