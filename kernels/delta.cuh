// Differences of elements, as filter.cu writes and unfilter.cu reads them.
//
// Elements of `width` bytes count as integers, least byte first.  The difference from the base, mod
// 2^(8 width), is folded so that small ones of either sign have leading zero bytes:
// 0, -1, 1, -2, ... become 0, 1, 2, 3, ...  An exclusive or in its place packed worse everywhere.
// Reference: `folded` in tests/kernels/memory.py.

// Elements of 4 bytes or fewer, side by side in a word.
struct Fields {
  u32 high;  // each one's highest bit
  u32 down;  // from there to its lowest one
};
__device__ __forceinline__ Fields fields_of(u32 width) {
  return {width == 1 ? 0x80808080u : width == 2 ? 0x80008000u : 0x80000000u, width * 8 - 1};
}
// All of each element's bits whose bit of `highest` is set.
__device__ __forceinline__ u32 spread(Fields f, u32 highest) {
  return highest - (highest >> f.down) | highest;
}
// No borrow and no carry goes from an element to the next.
__device__ __forceinline__ u32 folded(Fields f, u32 a, u32 b) {
  const u32 d = ((a | f.high) - (b & ~f.high)) ^ (~(a ^ b) & f.high);
  return (d & ~f.high) << 1 ^ spread(f, d & f.high);
}
__device__ __forceinline__ u32 unfolded(Fields f, u32 z, u32 b) {
  const u32 low = z & f.high >> f.down;
  const u32 d = (z ^ low) >> 1 ^ spread(f, low << f.down);
  return ((d & ~f.high) + (b & ~f.high)) ^ ((d ^ b) & f.high);
}
__device__ __forceinline__ u64 folded(u64 a, u64 b) { return (a - b) << 1 ^ (0 - (a - b >> 63)); }
__device__ __forceinline__ u64 unfolded(u64 z, u64 b) { return (z >> 1 ^ (0 - (z & 1))) + b; }

// A unit less (BACK: plus) the base's.
template <bool BACK> __device__ __forceinline__ uint4 shifted(uint4 v, uint4 b, u32 width) {
  if (width < 8) {
    const Fields f = fields_of(width);
    if (BACK)
      return make_uint4(unfolded(f, v.x, b.x), unfolded(f, v.y, b.y), unfolded(f, v.z, b.z),
                        unfolded(f, v.w, b.w));
    return make_uint4(folded(f, v.x, b.x), folded(f, v.y, b.y), folded(f, v.z, b.z),
                      folded(f, v.w, b.w));
  }
  const u64 p = (u64)v.y << 32 | v.x, q = (u64)b.y << 32 | b.x;
  const u64 r = (u64)v.w << 32 | v.z, s = (u64)b.w << 32 | b.z;
  const u64 x = BACK ? unfolded(p, q) : folded(p, q), y = BACK ? unfolded(r, s) : folded(r, s);
  return make_uint4((u32)x, (u32)(x >> 32), (u32)y, (u32)(y >> 32));
}

// This lane's units less (BACK: plus) those of the base, whose first `count` bytes there are.  Uses
// `tile`: of a full one, v waits there meanwhile, since registers don't hold both.
template <bool BACK>
__device__ __forceinline__ void shift_tile(const u8 *base, u32 count, u32 width,
                                           uint4 *__restrict__ tile, uint4 *v) {
  uint4 *mine = tile + threadIdx.x % 32;
  if (count == TILE) {
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) mine[u * 32] = v[u];
    __syncwarp(ALL);
    load_full(base, v);
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) v[u] = shifted<BACK>(mine[u * 32], v[u], width);
  } else {
    load_bytes(base, count, tile);
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) v[u] = shifted<BACK>(v[u], mine[u * 32], width);
  }
  __syncwarp(ALL);
}
