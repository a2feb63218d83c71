// Sums of squares of elements of one and two bytes.  Reference: gpuckpt/squares.py.
//
// All is done lane by lane, in one order, so that vectors of any length give the same bits.
#include "native.h"

// A block is ROWS rows of LANES codes of two bytes: a lane's squares are added in float32.
enum { LANES = 1024, ROWS = 16, BLOCK = LANES * ROWS };

INLINE float as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The square of a float16, by its bits without the sign, of which all exponents count as finite.
// The usual way, a product with 2**112, takes a CPU long where the float16 is subnormal.
INLINE float half_squared(u32 magnitude) {
  const u32 bits = (magnitude << 13) + (112u << 23);
  const u32 subnormal = magnitude < 1u << 10 ? ~0u : 0;
  const float x = as_float(bits + (subnormal & 1u << 23)) - as_float(subnormal & 113u << 23);
  return x * x;
}

INLINE float squared(u32 code, u32 kind, u32 mask, u32 shift) {
  if (kind == 1) return half_squared(code & 0x7fff);
  if (kind == 2) return as_float(code << 16) * as_float(code << 16);
  return half_squared((code & mask) << shift) + half_squared((code >> 8 & mask) << shift);
}

// Some rows of a block, two at a time: adding zeros changes nothing.
INLINE void add_rows(const u8 *restrict codes, size_t rows, u32 kind, u32 mask, u32 shift,
                     double *restrict lanes) {
  float sums[LANES] = {0};
  for (size_t row = 0; row < rows; row += 2)
    for (size_t i = 0; i < LANES; ++i) {
      u16 one, other;
      memcpy(&one, codes + 2 * (row * LANES + i), 2);
      memcpy(&other, codes + 2 * (row * LANES + LANES + i), 2);
      sums[i] += squared(one, kind, mask, shift);
      sums[i] += squared(other, kind, mask, shift);
    }
  for (size_t i = 0; i < LANES; ++i) lanes[i] += (double)sums[i];
}

// Whether an element is infinite or NaN.  bfloat16's squares tell by themselves.
INLINE int has_strange(const u8 *codes, size_t size, u32 kind, u32 mask, u32 top, u32 odd) {
  int16_t half = 0;
  u8 byte = 0;
  if (kind == 1)
    for (size_t i = 0; i < size / 2; ++i) {
      int16_t code;
      memcpy(&code, codes + 2 * i, 2);
      code &= 0x7fff;
      half = code > half ? code : half;
    }
  if (kind == 5)
    for (size_t i = 0; i < size; ++i) {
      const u8 code = (u8)(codes[i] & mask);
      byte = code > byte ? code : byte;
    }
  return half >= 0x7c00 || byte > top || (odd < 256 && memchr(codes, (int)odd, size));
}

INLINE void add_all(const u8 *raw, size_t size, u32 kind, u32 mask, u32 shift, u32 top, u32 odd,
                    double *lanes) {
  enum { FULL = 2 * BLOCK, PAIR = 4 * LANES };
  u8 last[FULL];
  for (size_t at = 0; at < size; at += FULL) {
    const size_t some = size - at < FULL ? size - at : FULL;
    const u8 *codes = raw + at;
    const size_t pairs = (some + PAIR - 1) / PAIR;
    if (some % PAIR) {
      memcpy(last, codes, some);
      memset(last + some, 0, pairs * PAIR - some);
      codes = last;
    }
    add_rows(codes, 2 * pairs, kind, mask, shift, lanes);
    if (has_strange(codes, some, kind, mask, top, odd)) lanes[0] = __builtin_inf();
  }
}

INLINE void add_kind(const u8 *raw, size_t size, u32 kind, u32 mask, u32 shift, u32 top, u32 odd,
                     double *lanes) {
  if (kind == 1) add_all(raw, size, 1, 0, 0, 0, 256, lanes);
  if (kind == 2) add_all(raw, size, 2, 0, 0, 0, 256, lanes);
  if (kind == 5) add_all(raw, size, 5, mask, shift, top, odd, lanes);
}

#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
__attribute__((target("avx2"))) static void add_by_avx2(const u8 *raw, size_t size, u32 kind,
                                                        u32 mask, u32 shift, u32 top, u32 odd,
                                                        double *lanes) {
  add_kind(raw, size, kind, mask, shift, top, odd, lanes);
}
#endif

void gpuckpt_squares(const u8 *raw, size_t size, u32 kind, u32 mask, u32 shift, u32 top, u32 odd,
                     double *lanes) {
#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
  if (__builtin_cpu_supports("avx2")) {
    add_by_avx2(raw, size, kind, mask, shift, top, odd, lanes);
    return;
  }
#endif
  add_kind(raw, size, kind, mask, shift, top, odd, lanes);
}
