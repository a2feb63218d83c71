// XXH3-128 (seed 0, default secret) of leaves, for the kernels of chunks; written from
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
// Reference: gpuckpt/fingerprint.py.
//
// XXH3 adds 64-byte stripes to eight 64-bit accumulators and scrambles them after every 16 stripes
// (1 KiB).  Only the scrambling is a chain: what 16 stripes add is a sum mod 2^64 that doesn't
// depend on the accumulators.  So the warps make the leaf's 64 x 8 sums in any order, and one
// warp runs the chain of at most 63 scrambles over them.
//
// A leaf's length counts as a multiple of 256 (the reference appends zeros): its last stripe is
// always a whole one, and no variant for short inputs comes into play.
constexpr u32 STRIPE = 64, BLOCK = 1024, LANES = 8;  // LANES: XXH3's, its accumulators
constexpr u64 PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
constexpr u64 PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu;
constexpr u64 PRIME64_3 = 0x165667B19E3779F9u, PRIME64_4 = 0x85EBCA77C2B2AE63u;
constexpr u64 PRIME64_5 = 0x27D4EB2F165667C5u, PRIME_MX1 = 0x165667919E3779F9u;

__constant__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
__constant__ const u64 INITIAL[LANES] = {
    PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
};

// Eight bytes of the secret's copy, from an offset below 184 that isn't a multiple of 8.
__device__ __forceinline__ u64 across(const u64 *__restrict__ keys, u32 offset) {
  const u32 bits = offset % 8 * 8;
  return keys[offset / 8] >> bits | keys[offset / 8 + 1] << (64 - bits);
}

__device__ __forceinline__ u64 product(u64 word) { return (word & 0xffffffffu) * (word >> 32); }

// Adds up a tile, all lanes of a warp together.  v: this lane's units; stripe: the tile's first in
// its leaf; last: the leaf's last stripe; keys: a copy of the secret in shared memory, as
// registers are few; sums: the leaf's, of its 64 blocks x 8 lanes.
//
// Even and odd units of a lane lie in the first and last 8 stripes of a block; a unit has the XXH3
// lanes 2 (t mod 4) and the one after.
__device__ __forceinline__ void digest_tile(const uint4 *v, const u64 *__restrict__ keys,
                                            u32 stripe, u32 last, u64 *__restrict__ sums) {
  const u32 lane = threadIdx.x % 32, key = lane / 4 + lane % 4 * 2;
  u64 sum[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) {
    const u64 a = (u64)v[u].y << 32 | v[u].x, b = (u64)v[u].w << 32 | v[u].z;
    const u32 mine = stripe + u * 8 + lane / 4;
    u64 key_a = keys[key + u % 2 * 8], key_b = keys[key + u % 2 * 8 + 1];
    if (mine >= last) {  // only in a leaf's last tile
      if (mine > last) continue;
      key_a = across(keys, 121 + lane % 4 * 16);
      key_b = across(keys, 129 + lane % 4 * 16);
    }
    sum[u / 2][0] += b + product(a ^ key_a);
    sum[u / 2][1] += a + product(b ^ key_b);
  }
  // Lanes with the same t mod 4 add up; each step halves what a lane holds, too.
  const bool second = lane & 16, odd = lane & 8;
  u64 kept[2];
#pragma unroll
  for (u32 e = 0; e < 2; ++e)
    kept[e] = (second ? sum[1][e] : sum[0][e]) +
              __shfl_xor_sync(ALL, second ? sum[0][e] : sum[1][e], 16);
  u64 one = (odd ? kept[1] : kept[0]) + __shfl_xor_sync(ALL, odd ? kept[0] : kept[1], 8);
  one += __shfl_xor_sync(ALL, one, 4);
  if (!(lane & 4)) sums[(stripe / 16 + second) * LANES + lane % 4 * 2 + odd] = one;
}

__device__ __forceinline__ u64 merged(const u64 *__restrict__ acc, const u64 *__restrict__ keys,
                                      u32 offset, u64 start) {
  u64 hash = start;
  for (u32 i = 0; i < LANES; i += 2) {
    const u64 a = acc[i] ^ across(keys, offset + 8 * i);
    const u64 b = acc[i + 1] ^ across(keys, offset + 8 * i + 8);
    hash += a * b ^ __umul64hi(a, b);
  }
  hash = (hash ^ hash >> 37) * PRIME_MX1;
  return hash ^ hash >> 32;
}

__device__ __forceinline__ u64 big_endian(u64 x) {
  const u32 low = __byte_perm((u32)x, 0, 0x0123), high = __byte_perm((u32)(x >> 32), 0, 0x0123);
  return (u64)low << 32 | high;
}

// A block's first warp finishes a leaf of `length` bytes, a multiple of 256, whose sums are all
// there; they are used up.  Lanes 0 and 1 return the digest's words: its 16 bytes, most significant
// first.
__device__ __forceinline__ u64 finish_digest(u64 *__restrict__ sums,
                                             const u64 *__restrict__ keys, u32 length) {
  const u32 blocks = (length + BLOCK - 1) / BLOCK, lane = threadIdx.x;
  if (lane < LANES) {
    const u64 key = keys[16 + lane];
    u64 acc = INITIAL[lane];
    const u64 *sum = sums + lane;
#pragma unroll 4
    for (u32 b = 1; b < blocks; ++b, sum += LANES) {
      acc += *sum;
      acc = (acc ^ acc >> 47 ^ key) * PRIME32_1;
    }
    sums[lane] = acc + *sum;
  }
  __syncwarp(ALL);
  if (lane > 1) return 0;
  const u64 start = lane ? length * PRIME64_1 : ~(length * PRIME64_2);
  return big_endian(merged(sums, keys, lane ? 11 : 117, start));
}

// The same, written to where the leaf has its digest alone.
__device__ __forceinline__ void write_digest(u64 *__restrict__ sums,
                                             const u64 *__restrict__ keys, u32 length,
                                             u64 *__restrict__ digest) {
  const u64 word = finish_digest(sums, keys, length);
  if (threadIdx.x < 2) digest[threadIdx.x] = word;
}
