// float32 rounded to two bytes, by integers alone: no mode of the floating-point unit matters.
// Reference: gpuckpt/rounding.py.
#include "native.h"

INLINE u32 word(const u8 *raw, size_t at) {
  u32 bits;
  memcpy(&bits, raw + at * 4, 4);
  return bits;
}

INLINE void store(u8 *out, size_t at, u32 bits) {
  const u16 half = (u16)bits;
  memcpy(out + at * 2, &half, 2);
}

INLINE void to_bfloat16(const u8 *restrict raw, size_t count, u8 *restrict out) {
  INDEPENDENT
  for (size_t i = 0; i < count; ++i) {
    const u32 bits = word(raw, i);
    const u32 even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u32 nan = ((bits >> 16) & 0x8000) | 0x7fc0;
    const u32 is_nan = 0u - (u32)((int32_t)(bits & 0x7fffffff) > 0x7f800000);
    store(out, i, (even & ~is_nan) | (nan & is_nan));
  }
}

// All but what becomes a subnormal number, which is left zero; returns whether there is any.
INLINE u32 to_normal_float16(const u8 *restrict raw, size_t count, u8 *restrict out) {
  u32 any = 0;
  INDEPENDENT
  for (size_t i = 0; i < count; ++i) {
    const u32 bits = word(raw, i);
    const int32_t x = (int32_t)(bits & 0x7fffffff);
    int32_t even = (x - 0x38000000 + 0xfff + ((x >> 13) & 1)) >> 13;
    const int32_t over = -(int32_t)(even > 0x7c00);
    even = (even & ~over) | (0x7c00 & over);
    const int32_t nan = -(int32_t)(x > 0x7f800000);
    even = (even & ~nan) | ((0x7e00 | ((x >> 13) & 0x3ff)) & nan);
    const int32_t small = -(int32_t)(x < 0x38800000);
    any |= (u32)(small & -(int32_t)(x > 0x33000000));
    store(out, i, ((bits >> 16) & 0x8000) | (u32)(even & ~small));
  }
  return any;
}

INLINE void to_float16(const u8 *raw, size_t count, u8 *out) {
  enum { SOME = 64 };
  for (size_t at = 0; at < count; at += SOME) {
    const size_t some = count - at < SOME ? count - at : SOME;
    if (!to_normal_float16(raw + at * 4, some, out + at * 2)) continue;
    for (size_t i = at; i < at + some; ++i) {
      const u32 bits = word(raw, i), x = bits & 0x7fffffff;
      if (x >= 0x38800000 || x <= 0x33000000) continue;
      const u32 shift = 126 - (x >> 23), whole = (x & 0x7fffff) | 0x800000;
      const u32 even = (whole + (1u << (shift - 1)) - 1 + ((whole >> shift) & 1)) >> shift;
      store(out, i, ((bits >> 16) & 0x8000) | even);
    }
  }
}

INLINE void to_kind(const u8 *raw, size_t count, u32 kind, u8 *out) {
  if (kind == 1) to_float16(raw, count, out);
  if (kind == 2) to_bfloat16(raw, count, out);
}

#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
__attribute__((target("avx2"))) static void round_by_avx2(const u8 *raw, size_t count, u32 kind,
                                                          u8 *out) {
  to_kind(raw, count, kind, out);
}
#endif

void gpuckpt_round(const u8 *raw, size_t count, u32 kind, u8 *out) {
#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
  if (__builtin_cpu_supports("avx2")) {
    round_by_avx2(raw, count, kind, out);
    return;
  }
#endif
  to_kind(raw, count, kind, out);
}
