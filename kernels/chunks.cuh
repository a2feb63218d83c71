// What the kernels of chunks share: their table, and how a block reads its leaf.
//
// A leaf is 64 KiB of a chunk (docs/FORMAT.md, section 5).  A block takes a leaf at a time, each of
// its warps a tile of 2 KiB at a time.  In a tile, lane t holds four units of 16 bytes: those at
// 16 t, 512 + 16 t, 1024 + 16 t and 1536 + 16 t.  So a warp's accesses are 512 bytes in a row.
constexpr u32 LEAF = 65536, TILE = 2048, UNITS = TILE / UNIT / 32;
static_assert(LEAF % (WARPS * TILE) == 0 && UNITS == 4, "");

// A row of the table.  gpuckpt/devices/kernels.py has the same as CHUNK.
struct Chunk {
  u64 tensor;      //  0  address of the chunk's first byte in its tensor: any
  u64 nbytes;      //  8  raw bytes: any multiple of width, 0 too
  u64 planes;      // 16  where plane 0 begins in the staged bytes: a multiple of 16
  u64 stride;      // 24  from a plane to the next: a multiple of 16, at least nbytes / width
  u64 summaries;   // 32  where the first leaf's Summary lies in the staged bytes: a multiple of 16
  u64 first_leaf;  // 40  leaves of all rows before
  u64 base;        // 48  address of the bytes to take the difference from: any; 0: none
  u64 expected;    // 56  address of the 16-byte digests that leaves may have: 8-aligned; 0: none
  u64 values;      // 64  address of 256 float32, for kind 5; else not looked at
  u32 width;       // 72  bytes of an element, and so planes: 1, 2, 4 or 8
  u16 kind;        // 76  what statistics.cuh takes the elements for
  u16 turned;      // 78  1: planes are of elements turned left by one bit; width is 2, 4 or 8
};
static_assert(sizeof(Chunk) == 80 && alignof(Chunk) == 8, "");
#define AT(field, at) LIES(Chunk, field, at)
static_assert(AT(tensor, 0) && AT(nbytes, 8) && AT(planes, 16) && AT(stride, 24), "");
static_assert(AT(summaries, 32) && AT(first_leaf, 40) && AT(base, 48), "");
static_assert(AT(expected, 56) && AT(values, 64) && AT(width, 72) && AT(kind, 76), "");
static_assert(AT(turned, 78), "");
#undef AT

// Where one leaf lies in its chunk.
struct Leaf {
  u64 number;  // of all rows' leaves
  u64 begin;   // its first byte
  u32 length;  // its bytes
  u32 padded;  // its bytes as they count for the digest: with zeros up to a multiple of 256
};
__device__ __forceinline__ Leaf leaf_of(const Chunk &chunk, u64 leaf) {
  const u64 begin = (leaf - chunk.first_leaf) * LEAF, left = chunk.nbytes - begin;
  const u32 length = left < LEAF ? (u32)left : LEAF;
  return {leaf, begin, length, (length + 255) / 256 * 256};
}

// Bytes m … m + 15 of the 32 bytes of lo and hi, 0 <= m < 16.
__device__ __forceinline__ uint4 window(uint4 lo, uint4 hi, u32 m) {
  const bool two = m & 8, one = m & 4;
  const u32 a0 = two ? lo.z : lo.x, a1 = two ? lo.w : lo.y, a2 = two ? hi.x : lo.z;
  const u32 a3 = two ? hi.y : lo.w, a4 = two ? hi.z : hi.x, a5 = two ? hi.w : hi.y;
  const u32 b0 = one ? a1 : a0, b1 = one ? a2 : a1, b2 = one ? a3 : a2;
  const u32 b3 = one ? a4 : a3, b4 = one ? a5 : a4, bits = m % 4 * 8;
  return make_uint4(__funnelshift_r(b0, b1, bits), __funnelshift_r(b1, b2, bits),
                    __funnelshift_r(b2, b3, bits), __funnelshift_r(b3, b4, bits));
}

// Reads a full tile from a misaligned address: each unit by the two aligned ones that it lies in,
// but the first and the last one bytewise, as some of those bytes are another warp's, which may be
// writing them.
__device__ __forceinline__ void load_misaligned(const u8 *from, uint4 *v) {
  const u32 lane = threadIdx.x % 32, m = (u64)from % UNIT;
  const uint4 *aligned = reinterpret_cast<const uint4 *>(from - m) + lane;
  u32 end = __ldcs(from + (lane < UNIT ? lane : TILE - 32 + lane));
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u)
    if (u || lane) {
      if (u + 1 < UNITS || lane < 31)
        v[u] = window(__ldcs(aligned + u * 32), __ldcs(aligned + u * 32 + 1), m);
    }
  end <<= lane % 4 * 8;
  end |= __shfl_xor_sync(ALL, end, 1);
  end |= __shfl_xor_sync(ALL, end, 2);
  const u32 x = __shfl_sync(ALL, end, lane & 16), y = __shfl_sync(ALL, end, lane & 16 | 4);
  const u32 z = __shfl_sync(ALL, end, lane & 16 | 8), w = __shfl_sync(ALL, end, lane & 16 | 12);
  if (lane == 0) v[0] = make_uint4(x, y, z, w);
  if (lane == 31) v[UNITS - 1] = make_uint4(x, y, z, w);
}

// Reads this lane's units of a full tile.
__device__ __forceinline__ void load_full(const u8 *from, uint4 *v) {
  if ((u64)from % UNIT) {
    load_misaligned(from, v);
  } else {
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u)
      v[u] = __ldcs(reinterpret_cast<const uint4 *>(from) + u * 32 + threadIdx.x % 32);
  }
}
// Reads the first `count` bytes of a tile into `tile`, and puts zeros after them.
__device__ __forceinline__ void load_bytes(const u8 *from, u32 count, uint4 *__restrict__ tile) {
  u8 *bytes = reinterpret_cast<u8 *>(tile);
#pragma unroll 8
  for (u32 i = threadIdx.x % 32; i < TILE; i += 32) bytes[i] = i < count ? __ldcs(from + i) : 0;
  __syncwarp(ALL);
}
// Reads this lane's units of a tile whose first `count` bytes there are; zeros after them.  Nothing
// else is read.  May use `tile`.
__device__ __forceinline__ void load_tile(const u8 *from, u32 count, uint4 *__restrict__ tile,
                                          uint4 *v) {
  if (count == TILE) {
    load_full(from, v);
  } else {
    load_bytes(from, count, tile);
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) v[u] = tile[u * 32 + threadIdx.x % 32];
    __syncwarp(ALL);
  }
}

// Four bytes of each of four words, transposed: w of result k is byte k of a, b, c, d.
__device__ __forceinline__ uint4 transposed(uint4 v) {
  const u32 x = __byte_perm(v.x, v.y, 0x5140), y = __byte_perm(v.z, v.w, 0x5140);
  const u32 z = __byte_perm(v.x, v.y, 0x7362), w = __byte_perm(v.z, v.w, 0x7362);
  return make_uint4(__byte_perm(x, y, 0x5410), __byte_perm(x, y, 0x7632),
                    __byte_perm(z, w, 0x5410), __byte_perm(z, w, 0x7632));
}
