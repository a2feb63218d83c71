// Statistics of a leaf: how many elements are NaN or infinite, the sum of squares of all else, and
// the zero bytes of each plane.  They are taken while the leaf passes through registers.
//
// Kinds of elements: 0: bits only, 1: float16, 2: bfloat16, 3: float32 (and complex64's parts),
// 4: float64 (and complex128's), 5: bytes, worth what values[byte] says.
// Reference: gpuckpt/statistics.py.
//
// A lane sums the squares of a tile's 64 bytes in float32 first (float64's in float64), without a
// look at each: only if that sum says that something isn't finite, or too small or too large for
// float32, it goes through its bytes again, one element at a time, in float64.  So few are added in
// float32 that the sum stays within 1e-6; and always in the same order, so that it is the same in
// every run and on every grid.

// What a block writes for a leaf.  gpuckpt/devices/kernels.py has the same as SUMMARY.
struct Summary {
  u64 digest[2];  //  0  of the tensor's bytes: 16 bytes, most significant first
  double squares; // 16  of the finite elements
  u32 nans;       // 24
  u32 infs;       // 28
  u32 zeros[8];   // 32  zero bytes in each plane, as it was written
  u32 unchanged;  // 64  1: the digest is the expected one
  u32 unused[3];  // 68  0
};
static_assert(sizeof(Summary) == 80 && LIES(Summary, unchanged, 64), "");
static_assert(LIES(Summary, squares, 16), "");
static_assert(LIES(Summary, zeros, 32), "");

// What a block counts of a leaf.  It is here, not in registers, of which there are no more.
struct Counts {
  u32 strange[2];      // NaNs, infinities
  uint2 set[THREADS];  // a thread's bytes that aren't zero, by their position in 8: 32 at most each
};

// A magnitude of `top` and its like is infinite, a larger one a NaN.  A sum of squares from `least`
// on hardly feels what float32 lost of them; one from `limit` on may have lost what isn't finite.
constexpr float LEAST = 0x1p-100f;
constexpr u32 FLOAT_TOP = 0x7f800000u, HALF_TOP = 0x47800000u;

__device__ __forceinline__ float squared(u32 bits, float sum) {
  const float x = __uint_as_float(bits);
  return x * x + sum;
}
// A float16's magnitude as a float32; infinities and NaNs become 65536 and more.  Denormal ones are
// never denormal float32s on the way, which CuPy's -ftz=true takes for zero.
__device__ __forceinline__ u32 widened(u32 half) {
  const u32 bits = ((half & 0x7fff) << 13) + (112u << 23);
  const float denormal = __uint_as_float(bits + (1u << 23)) - 0x1p-14f;
  return bits < 113u << 23 ? __float_as_uint(denormal) : bits;
}
// A float32's magnitude, also a denormal one.
__device__ __forceinline__ double exactly(u32 bits) {
  return bits < 1u << 23 ? (double)bits * 0x1p-149 : (double)__uint_as_float(bits);
}

// The squares of a word's elements, added to two sums; there are several in it, or one.
template <u32 KIND>
__device__ __forceinline__ void add_word(u32 word, const float *__restrict__ values, float *sums) {
  if (KIND == 1) {
    sums[0] = squared(widened(word), sums[0]);
    sums[1] = squared(widened(word >> 16), sums[1]);
  } else if (KIND == 2) {
    sums[0] = squared(word << 16, sums[0]);
    sums[1] = squared(word & 0xffff0000u, sums[1]);
  } else if (KIND == 3) {
    sums[0] = squared(word, sums[0]);
  } else {
#pragma unroll
    for (u32 k = 0; k < 4; ++k)
      sums[k % 2] = squared(__float_as_uint(__ldg(values + (word >> k * 8 & 0xff))), sums[k % 2]);
  }
}
template <u32 KIND>
__device__ __forceinline__ float squares_of_unit(uint4 v, const float *__restrict__ values) {
  float sums[2] = {0, 0};
  add_word<KIND>(v.x, values, sums);
  add_word<KIND>(v.y, values, sums);
  add_word<KIND>(v.z, values, sums);
  add_word<KIND>(v.w, values, sums);
  return sums[0] + sums[1];
}
// The squares of this lane's bytes of a tile.
template <u32 KIND> __device__ __forceinline__ float squares_of(const uint4 *v) {
  float whole = 0;
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) whole += squares_of_unit<KIND>(v[u], 0);
  return whole;
}
// The same of bytes, whose units lie in `tile`: registers hold the look-ups of one.
__device__ __forceinline__ float squares_of_bytes(const uint4 *__restrict__ tile,
                                                  const float *__restrict__ values) {
  float whole = 0;
#pragma unroll 1
  for (u32 u = 0; u < UNITS; ++u)
    whole += squares_of_unit<5>(tile[u * 32 + threadIdx.x % 32], values);
  return whole;
}
__device__ __forceinline__ double squares_of_doubles(const uint4 *v) {
  double whole = 0;
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) {
    const double a = __longlong_as_double((i64)((u64)v[u].y << 32 | v[u].x));
    const double b = __longlong_as_double((i64)((u64)v[u].w << 32 | v[u].z));
    whole += a * a + b * b;
  }
  return whole;
}

// One element: its magnitude's bits, and those of infinity.  strange: NaNs, and infinities from bit
// 16 on.
__device__ __forceinline__ void add_one(u64 bits, u64 top, double value, double &squares,
                                        u32 &strange) {
  if (bits > top)
    strange += 1;
  else if (bits == top)
    strange += 1 << 16;
  else
    squares += value * value;
}
// All elements of this lane's units, which lie in `tile`, one by one; of kind 5 the `valid` first
// ones of the tile.  strange: the block's NaNs and infinities.
__device__ __forceinline__ void add_slowly(const uint4 *__restrict__ tile, u32 kind,
                                           const float *__restrict__ values, u32 valid,
                                           double &squares, u32 *strange) {
  const u8 *bytes = reinterpret_cast<const u8 *>(tile + threadIdx.x % 32);
  const u32 size = kind == 4 ? 8 : kind == 3 ? 4 : kind == 5 ? 1 : 2;
  u32 found = 0;
#pragma unroll 1
  for (u32 i = 0; i < UNITS * UNIT; i += size) {
    const u32 at = i / UNIT * (32 * UNIT) + i % UNIT;
    if (kind == 4) {
      const u64 bits = *reinterpret_cast<const u64 *>(bytes + at) & ~0ull >> 1;
      add_one(bits, 0x7ffull << 52, __longlong_as_double((i64)bits), squares, found);
      continue;
    }
    u32 bits;
    if (kind == 3)
      bits = *reinterpret_cast<const u32 *>(bytes + at);
    else if (kind == 5)
      bits = at + threadIdx.x % 32 * UNIT < valid ? __float_as_uint(__ldg(values + bytes[at])) : 0;
    else
      bits = *reinterpret_cast<const u16 *>(bytes + at);
    if (kind == 1) bits = widened(bits);
    if (kind == 2) bits <<= 16;
    bits &= ~0u >> 1;
    const u32 top = kind == 1 ? HALF_TOP : FLOAT_TOP;
    add_one(bits, top, exactly(bits), squares, found);
  }
  if (found) {  // whole numbers, whose order doesn't matter
    atomicAdd(strange, found & 0xffff);
    atomicAdd(strange + 1, found >> 16);
  }
}

__device__ __forceinline__ void keep_units(const uint4 *v, uint4 *__restrict__ tile) {
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) tile[u * 32 + threadIdx.x % 32] = v[u];
}
// Adds this lane's units of a tile whose first `count` bytes there are, zeros after them.  May use
// its own units of `tile`, so that slow ways don't need registers for v.
__device__ __forceinline__ void add_statistics(uint4 *v, u32 kind,
                                               const float *__restrict__ values, u32 count,
                                               uint4 *__restrict__ tile, double &whole,
                                               u32 *strange) {
  double squares = 0;
  float single = 0;
  switch (kind) {
    case 0: return;
    case 1: single = squares_of<1>(v); break;
    case 2: single = squares_of<2>(v); break;
    case 3: single = squares_of<3>(v); break;
    case 4: squares = squares_of_doubles(v); break;
    case 5:
      keep_units(v, tile);
      if (count == TILE) single = squares_of_bytes(tile, values);
      break;
  }
  if (kind != 4) squares = single >= LEAST ? (double)single : 0;
  const double limit = kind == 1 ? 0x1p32 : __longlong_as_double(0x7ffll << 52);
  if (squares > 0 && squares < limit) {
    whole += squares;
    return;
  }
  u32 any = kind == 5;
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) any |= v[u].x | v[u].y | v[u].z | v[u].w;
  if (!any) return;
  keep_units(v, tile);
  add_slowly(tile, kind, values, count, whole, strange);
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) v[u] = tile[u * 32 + threadIdx.x % 32];
}

// 1 in each byte of a word that isn't zero.
__device__ __forceinline__ u32 set_bytes(u32 word) {
  return ((word & 0x7f7f7f7f) + 0x7f7f7f7f | word) >> 7 & 0x01010101;
}
// Counts this lane's bytes of a tile as they go to planes.
__device__ __forceinline__ void count_bytes(const uint4 *v, uint2 &set) {
  u32 even = 0, odd = 0;
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) {
    even += set_bytes(v[u].x) + set_bytes(v[u].z);
    odd += set_bytes(v[u].y) + set_bytes(v[u].w);
  }
  set = make_uint2(set.x + even, set.y + odd);
}

// Adds up what all threads counted, by one warp, and writes it.  tiles: where each thread has put
// its squares; count: elements of the leaf.
__device__ __forceinline__ void write_statistics(const uint4 (*tiles)[TILE / UNIT],
                                                 const Counts &counts, u32 width, u32 count,
                                                 Summary *__restrict__ summary) {
  const u32 lane = threadIdx.x % 32;
  double squares = 0;
  u32 set[4] = {0, 0, 0, 0};
  for (u32 w = 0; w < WARPS; ++w) {
    const uint2 part = counts.set[w * 32 + lane];
    squares += *reinterpret_cast<const double *>(&tiles[w][lane]);
    set[0] += part.x & 0x00ff00ff;
    set[1] += part.x >> 8 & 0x00ff00ff;
    set[2] += part.y & 0x00ff00ff;
    set[3] += part.y >> 8 & 0x00ff00ff;
  }
#pragma unroll
  for (u32 step = 16; step; step /= 2) {
    squares += __shfl_xor_sync(ALL, squares, step);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) set[i] += __shfl_xor_sync(ALL, set[i], step);
  }
  // Lanes 0 ... 7 each take a position in 8 bytes; those that belong to one plane add up.
  const u32 low = lane & 4 ? set[2] : set[0], high = lane & 4 ? set[3] : set[1];
  u32 bytes = (lane & 1 ? high : low) >> (lane & 2 ? 16 : 0) & 0xffff;
  for (u32 step = width; step < 8; step *= 2) bytes += __shfl_xor_sync(ALL, bytes, step);
  if (lane < 8) summary->zeros[lane] = lane < width ? count - bytes : 0;
  if (lane == 0) summary->squares = squares;
  if (lane == 1) summary->nans = counts.strange[0];
  if (lane == 2) summary->infs = counts.strange[1];
}
