// One pass over a chunk: its fingerprint's leaves, its sum of squares, and its planes.
// References: gpuckpt/fingerprint.py, gpuckpt/statistics.py, gpuckpt/planes.py.
//
// A leaf is done with while it is in the core's own cache, and the next one is fetched meanwhile.
#include "native.h"

#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#endif

// XXH3-128 (seed 0, default secret) of leaves of 256 bytes and more; written from
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
enum { LEAF = 1 << 16, UNIT = 256, STRIPE = 64, STRIPES = 16, FIRST = 8, SINGLES = 32 };

static const u64 PRIME32_1 = 0x9E3779B1, PRIME64_1 = 0x9E3779B185EBCA87;
static const u64 PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME_MX1 = 0x165667919E3779F9;
static const u64 SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
static const u64 INITIAL[FIRST] = {
    0xC2B2AE3D,         0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x85EBCA77,         0x27D4EB2F165667C5, 0x9E3779B1,
};

INLINE u64 word_at(const u8 *bytes) {
  u64 word;
  memcpy(&word, bytes, 8);
  return word;
}

static void accumulate(u64 *acc, const u8 *stripes, size_t count, const u8 *secret) {
  for (size_t s = 0; s < count; ++s)
    for (size_t i = 0; i < FIRST; ++i) {
      const u64 word = word_at(stripes + s * STRIPE + 8 * i);
      const u64 keyed = word ^ word_at(secret + 8 * (s + i));
      acc[i ^ 1] += word;
      acc[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
}

INLINE void scramble(u64 *acc) {
  for (size_t i = 0; i < FIRST; ++i)
    acc[i] = (acc[i] ^ acc[i] >> 47 ^ SECRET[16 + i]) * PRIME32_1;
}

// All of a leaf but its last stripe.
static void accumulate_leaf(u64 *acc, const u8 *leaf, size_t size) {
  const size_t most = STRIPE * STRIPES;
  size_t at = 0;
  for (; at + most < size; at += most) {
    accumulate(acc, leaf + at, STRIPES, (const u8 *)SECRET);
    scramble(acc);
  }
  accumulate(acc, leaf + at, (size - 1 - at) / STRIPE, (const u8 *)SECRET);
}

#ifdef AVX2
AVX2 static void accumulate_leaf_by_avx2(u64 *acc, const u8 *leaf, size_t size) {
  const __m256i *secret = (const __m256i *)SECRET;
  const __m256i prime = _mm256_set1_epi32((int)0x9E3779B1);
  __m256i sums[2] = {_mm256_loadu_si256((const __m256i *)acc),
                     _mm256_loadu_si256((const __m256i *)acc + 1)};
  const size_t stripes = (size - 1) / STRIPE;
  for (size_t s = 0; s < stripes; s += STRIPES) {
    const size_t some = stripes - s < STRIPES ? stripes - s : STRIPES;
    for (size_t t = 0; t < some; ++t)
      for (size_t k = 0; k < 2; ++k) {
        const u8 *key = (const u8 *)SECRET + 8 * t + 32 * k;
        const __m256i word =
            _mm256_loadu_si256((const __m256i *)(leaf + (s + t) * STRIPE + 32 * k));
        const __m256i keyed = _mm256_xor_si256(word, _mm256_loadu_si256((const __m256i *)key));
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        sums[k] = _mm256_add_epi64(sums[k], _mm256_shuffle_epi32(word, 0x4e));
        sums[k] = _mm256_add_epi64(sums[k], product);
      }
    if (some < STRIPES || (s + STRIPES) * STRIPE >= size) break;
    for (size_t k = 0; k < 2; ++k) {
      __m256i x = _mm256_xor_si256(sums[k], _mm256_srli_epi64(sums[k], 47));
      x = _mm256_xor_si256(x, _mm256_loadu_si256(secret + 4 + k));
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
      sums[k] = _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
    }
  }
  _mm256_storeu_si256((__m256i *)acc, sums[0]);
  _mm256_storeu_si256((__m256i *)acc + 1, sums[1]);
}
#endif

INLINE u64 merged(const u64 *acc, const u8 *secret, u64 hash) {
  for (size_t i = 0; i < FIRST; i += 2) {
    const u64 a = acc[i] ^ word_at(secret + 8 * i), b = acc[i + 1] ^ word_at(secret + 8 * i + 8);
    const unsigned __int128 product = (unsigned __int128)a * b;
    hash += (u64)product ^ (u64)(product >> 64);
  }
  hash = (hash ^ hash >> 37) * PRIME_MX1;
  return hash ^ hash >> 32;
}

// `size` is a multiple of UNIT, and not 0.
static void digest_leaf(const u8 *leaf, size_t size, int avx2, u8 *digest) {
  const u8 *secret = (const u8 *)SECRET;
  u64 acc[FIRST];
  memcpy(acc, INITIAL, sizeof acc);
#ifdef AVX2
  if (avx2)
    accumulate_leaf_by_avx2(acc, leaf, size);
  else
#endif
    accumulate_leaf(acc, leaf, size);
  (void)avx2;
  accumulate(acc, leaf + size - STRIPE, 1, secret + 121);
  const u64 high = __builtin_bswap64(merged(acc, secret + 117, ~(size * PRIME64_2)));
  const u64 low = __builtin_bswap64(merged(acc, secret + 11, size * PRIME64_1));
  memcpy(digest, &high, 8);
  memcpy(digest + 8, &low, 8);
}

// The squares of float32 are exact in double, and neither too large nor too small for it.
// Adding zeros changes nothing.
INLINE void add_singles(const u8 *raw, size_t count, double *lanes) {
  double sums[SINGLES] = {0};
  for (size_t at = 0; at < count; at += SINGLES) {
    float x[SINGLES] = {0};
    memcpy(x, raw + 4 * at, 4 * (count - at < SINGLES ? count - at : SINGLES));
    for (size_t i = 0; i < SINGLES; ++i) sums[i] += (double)x[i] * (double)x[i];
  }
  for (size_t i = 0; i < SINGLES; ++i) lanes[i] += sums[i];
}

#ifdef AVX2
// Whole rows of SINGLES.  `next` is fetched into the cache, as many bytes of it.
AVX2 static void add_singles_by_avx2(const u8 *raw, size_t count, const u8 *next, double *lanes) {
  __m256d sums[8] = {{0}};
  for (size_t at = 0; at < count; at += SINGLES) {
    _mm_prefetch((const char *)next + 4 * at, _MM_HINT_T1);
    _mm_prefetch((const char *)next + 4 * at + 64, _MM_HINT_T1);
    for (size_t k = 0; k < 8; ++k) {
      const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps((const float *)(raw + 4 * at) + 4 * k));
      sums[k] = _mm256_fmadd_pd(x, x, sums[k]);
    }
  }
  for (size_t k = 0; k < 8; ++k)
    _mm256_storeu_pd(lanes + 4 * k, _mm256_add_pd(_mm256_loadu_pd(lanes + 4 * k), sums[k]));
}
#endif

static void add_squares(const u8 *leaf, size_t size, const u8 *next, int avx2, u32 kind, u32 mask,
                        u32 shift, u32 top, u32 odd, double *lanes) {
  if (kind == 3) {
    size_t whole = 0;
#ifdef AVX2
    if (avx2) {
      whole = size / 4 / SINGLES * SINGLES;
      add_singles_by_avx2(leaf, whole, next, lanes);
    }
#endif
    add_singles(leaf + 4 * whole, size / 4 - whole, lanes);
  } else if (kind) {
    gpuckpt_squares(leaf, size, kind, mask, shift, top, odd, lanes);
  }
  (void)avx2, (void)next;
}

void gpuckpt_look(const u8 *raw, size_t size, u32 kind, u32 mask, u32 shift, u32 top, u32 odd,
                  double *lanes, u8 *digests, size_t width, u8 *out) {
#ifdef AVX2
  const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  const int avx2 = 0;
#endif
  for (size_t at = 0; at < size; at += LEAF, digests += 16) {
    const u8 *leaf = raw + at, *next = size - at > 2 * LEAF ? leaf + LEAF : leaf;
    const size_t some = size - at < LEAF ? size - at : LEAF;
    if (some % UNIT) {
      u8 last[LEAF];
      const size_t whole = (some + UNIT - 1) / UNIT * UNIT;
      memcpy(last, leaf, some);
      memset(last + some, 0, whole - some);
      digest_leaf(last, whole, avx2, digests);
    } else {
      digest_leaf(leaf, some, avx2, digests);
    }
    add_squares(leaf, some, next, avx2, kind, mask, shift, top, odd, lanes);
    if (out) gpuckpt_split(leaf, some / width, width, out + at / width, size / width);
  }
}
