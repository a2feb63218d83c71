// What filter.cu and unfilter.cu share: the table of chunks, and how a block reads its leaf.
//
// A leaf is 64 KiB of a chunk (docs/FORMAT.md, section 5).  A block takes a leaf at a time, each of
// its warps a tile of 2 KiB at a time.  In a tile, lane t holds four units of 16 bytes: those at
// 16 t, 512 + 16 t, 1024 + 16 t and 1536 + 16 t.  So a warp's accesses are 512 bytes in a row.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 LEAF = 65536, TILE = 2048, UNIT = 16, UNITS = TILE / UNIT / 32;
constexpr u32 THREADS = 256, WARPS = THREADS / 32, ALL = 0xffffffffu;
static_assert(LEAF % (WARPS * TILE) == 0 && UNITS == 4, "");

// A row of the table.  gpuckpt/devices/kernels.py has the same as CHUNK.
struct Chunk {
  u64 tensor;      //  0  address of the chunk's first byte in its tensor: any
  u64 nbytes;      //  8  raw bytes: any multiple of width, 0 too
  u64 planes;      // 16  where plane 0 begins in the staged bytes: a multiple of 16
  u64 stride;      // 24  from a plane to the next: a multiple of 16, at least nbytes / width
  u64 first_leaf;  // 32  leaves of all rows before
  u32 width;       // 40  bytes of an element, and so planes: 1, 2, 4 or 8
  u32 unused;      // 44  0
};
static_assert(sizeof(Chunk) == 48 && alignof(Chunk) == 8, "");
#define AT(field) __builtin_offsetof(Chunk, field)
static_assert(AT(tensor) == 0 && AT(nbytes) == 8 && AT(planes) == 16 && AT(stride) == 24, "");
static_assert(AT(first_leaf) == 32 && AT(width) == 40 && AT(unused) == 44, "");
#undef AT

// The row that has this leaf, found by the whole block: the last one whose first_leaf is not
// above it.  Each round leaves 1/256 of the rows.
__device__ __forceinline__ u64 row_of(const Chunk *__restrict__ chunks, u64 rows, u64 leaf) {
  u64 low = 0;
  while (rows > 1) {
    const u64 step = (rows + THREADS - 1) / THREADS, at = threadIdx.x * step;
    const bool below = at < rows && chunks[low + at].first_leaf <= leaf;
    const u64 found = (u64)(__syncthreads_count(below) - 1) * step;
    low += found;
    rows = rows - found < step ? rows - found : step;
  }
  return low;
}

// Where one leaf lies.
struct Leaf {
  u64 tensor;   // address of its first byte in the tensor
  u64 begin;    // its first byte in the chunk
  u32 length;   // its bytes
  u32 padded;   // its bytes as they count for the digest: with zeros up to a multiple of 256
  u32 follows;  // bytes of the chunk after it, 16 at most
};
__device__ __forceinline__ Leaf leaf_of(const Chunk &chunk, u64 leaf) {
  const u64 begin = (leaf - chunk.first_leaf) * LEAF, left = chunk.nbytes - begin;
  const u32 near = left < LEAF + UNIT ? (u32)left : LEAF + UNIT;
  const u32 length = near < LEAF ? near : LEAF;
  return {chunk.tensor + begin, begin, length, (length + 255) / 256 * 256, near - length};
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

// Four bytes of each of four words, transposed: w of result k is byte k of a, b, c, d.
__device__ __forceinline__ uint4 transposed(uint4 v) {
  const u32 x = __byte_perm(v.x, v.y, 0x5140), y = __byte_perm(v.z, v.w, 0x5140);
  const u32 z = __byte_perm(v.x, v.y, 0x7362), w = __byte_perm(v.z, v.w, 0x7362);
  return make_uint4(__byte_perm(x, y, 0x5410), __byte_perm(x, y, 0x7632),
                    __byte_perm(z, w, 0x5410), __byte_perm(z, w, 0x7632));
}
