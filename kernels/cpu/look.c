// One pass over a chunk: its fingerprint's leaves, its sum of squares, and its planes.
// References: gpuckpt/fingerprint.py, gpuckpt/statistics.py, gpuckpt/planes.py.
//
// A leaf is done with while it is in the core's own cache, and the next one is fetched meanwhile.
#define _XOPEN_SOURCE 700
#define _FILE_OFFSET_BITS 64
#include "native.h"

#include <errno.h>
#include <unistd.h>

#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#endif

// XXH3-128 (seed 0, default secret) of leaves of 256 bytes and more; written from
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
// FIRST: its accumulators.  SINGLES: those of squares of float32.  SHORT: up to so many bytes,
// XXH3 is another.
// PART: bytes that are read before they are looked at, in the core's own cache.
enum { PART = 1 << 18 };
enum { LEAF = 1 << 16, UNIT = 256, BLOCK = 1024, STRIPE = 64, FIRST = 8, SINGLES = 32, SHORT = 240 };

static const u64 PRIME32_1 = 0x9E3779B1u, PRIME64_1 = 0x9E3779B185EBCA87;
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

INLINE void accumulate(u64 *acc, const u8 *stripes, size_t count, const u8 *secret) {
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

// Whole blocks of a leaf and of its chunk, which begin together: what they add is the same.
static void add_blocks(const u8 *bytes, size_t blocks, u64 *leaf, u64 *chunk) {
  for (; blocks; --blocks, bytes += BLOCK) {
    u64 sums[FIRST] = {0};
    accumulate(sums, bytes, BLOCK / STRIPE, (const u8 *)SECRET);
    for (size_t i = 0; i < FIRST; ++i) leaf[i] += sums[i], chunk[i] += sums[i];
    scramble(leaf);
    scramble(chunk);
  }
}

#ifdef AVX2
#define LOAD(place) _mm256_loadu_si256((const __m256i *)(place))

AVX2 INLINE __m256i scrambled(__m256i acc, size_t half) {
  const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
  const __m256i x = acc ^ _mm256_srli_epi64(acc, 47) ^ LOAD(SECRET + 16 + 4 * half);
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
}

AVX2 static void add_blocks_by_avx2(const u8 *bytes, size_t blocks, u64 *leaf, u64 *chunk) {
  for (; blocks; --blocks, bytes += BLOCK)
    for (size_t half = 0; half < 2; ++half) {
      __m256i sum = _mm256_setzero_si256();
      for (size_t s = 0; s < BLOCK / STRIPE; ++s) {
        const __m256i word = LOAD(bytes + s * STRIPE + 32 * half);
        const __m256i keyed = word ^ LOAD(SECRET + s + 4 * half);
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        sum = _mm256_add_epi64(sum, _mm256_add_epi64(_mm256_shuffle_epi32(word, 0x4e), product));
      }
      u64 *const accs[2] = {leaf + 4 * half, chunk + 4 * half};
      for (size_t k = 0; k < 2; ++k)
        _mm256_storeu_si256((__m256i *)accs[k],
                            scrambled(_mm256_add_epi64(LOAD(accs[k]), sum), half));
    }
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

// The digest of a leaf; `size`, which isn't 0, is filled up with zeros.  Where its `chunk` doesn't
// end with it, goes on with the chunk's accumulators.
static void digest_leaf(const u8 *leaf, size_t size, int avx2, u8 *digest, u64 *chunk, int ends) {
  const u8 *const secret = (const u8 *)SECRET;
  const size_t whole = (size + UNIT - 1) / UNIT * UNIT, blocks = (size - 1) / BLOCK;
  u64 acc[FIRST];
  memcpy(acc, INITIAL, sizeof acc);
#ifdef AVX2
  if (avx2)
    add_blocks_by_avx2(leaf, blocks, acc, chunk);
  else
#endif
    add_blocks(leaf, blocks, acc, chunk);
  (void)avx2;
  const u8 *const bytes = leaf + blocks * BLOCK;
  const size_t left = size - blocks * BLOCK;
  u8 last[BLOCK] = {0};
  memcpy(last, bytes, left);
  accumulate(acc, last, (whole - blocks * BLOCK - 1) / STRIPE, secret);
  accumulate(acc, last + (whole - blocks * BLOCK - STRIPE), 1, secret + 121);
  accumulate(chunk, last, ends ? (left - 1) / STRIPE : left / STRIPE, secret);
  if (!ends) scramble(chunk);
  const u64 high = __builtin_bswap64(merged(acc, secret + 117, ~(whole * PRIME64_2)));
  const u64 low = __builtin_bswap64(merged(acc, secret + 11, whole * PRIME64_1));
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

static int has_avx2(void) {
#ifdef AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

// XXH3-64 of a chunk, from its accumulators; 0 of so few bytes that it is another.
static u64 check_of(u64 *chunk, const u8 *raw, size_t size) {
  if (size <= SHORT) return 0;
  accumulate(chunk, raw + size - STRIPE, 1, (const u8 *)SECRET + 121);
  return merged(chunk, (const u8 *)SECRET + 11, size * PRIME64_1);
}

double gpuckpt_look(const u8 *raw, size_t size, u32 kind, u32 mask, u32 shift, u32 top, u32 odd,
                    double *lanes, u8 *digests, u64 *check, size_t width, u32 turned,
                    u8 *out) {
  const int avx2 = has_avx2();
  double singles[SINGLES] = {0};
  u64 chunk[FIRST];
  memcpy(chunk, INITIAL, sizeof chunk);
  if (kind == 3) lanes = singles;
  for (size_t at = 0; at < size; at += LEAF, digests += 16) {
    const u8 *leaf = raw + at, *next = size - at > 2 * LEAF ? leaf + LEAF : leaf;
    const size_t some = size - at < LEAF ? size - at : LEAF;
    digest_leaf(leaf, some, avx2, digests, chunk, at + some == size);
    add_squares(leaf, some, next, avx2, kind, mask, shift, top, odd, lanes);
    if (out)
      (turned ? gpuckpt_split_turned : gpuckpt_split)(leaf, some / width, width, out + at / width,
                                                      size / width);
  }
  *check = check_of(chunk, raw, size);
  double sum = 0;
  for (size_t i = 0; i < SINGLES; ++i) sum += singles[i];
  return sum;
}

void gpuckpt_check_tiles(const u8 *bytes, const u32 *sizes, size_t count, u8 *checks) {
  const int avx2 = has_avx2();
  for (size_t t = 0; t < count; bytes += sizes[t++]) {
    u64 unused[FIRST] = {0};
    u8 digest[16];
    digest_leaf(bytes, sizes[t], avx2, digest, unused, 1);
    memcpy(checks + 8 * t, digest, 8);
  }
}

// Up to `end` of `out`, from `at` on; how far the file goes, or the system's error below zero.
static ptrdiff_t read_to(int file, u64 offset, u8 *out, size_t at, size_t end) {
  while (at < end) {
    const ssize_t count = pread(file, out + at, end - at, (off_t)(offset + at));
    if (count < 0 && errno != EINTR) return -errno;
    if (!count) break;
    at += count > 0 ? (size_t)count : 0;
  }
  return (ptrdiff_t)at;
}

ptrdiff_t gpuckpt_read(int file, u64 offset, u8 *out, size_t size, u8 *digests, u64 *check) {
  const int avx2 = has_avx2();
  u64 chunk[FIRST];
  memcpy(chunk, INITIAL, sizeof chunk);
  for (size_t at = 0; at < size;) {
    const size_t end = size - at < PART ? size : at + PART;
    const ptrdiff_t found = read_to(file, offset, out, at, end);
    if (found < 0 || (size_t)found < end) return found;
    for (; at < end; at += LEAF, digests += 16) {
      const size_t some = end - at < LEAF ? end - at : LEAF;
      digest_leaf(out + at, some, avx2, digests, chunk, at + some == size);
    }
  }
  *check = check_of(chunk, out, size);
  return (ptrdiff_t)size;
}
