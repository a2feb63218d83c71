// Differences from a base and back.  Reference: gpuckpt/deltas.py.
#include "native.h"

// The difference is modular, and its sign goes to the lowest bit.
#define DELTA(BITS)                                                                              \
  INLINE void delta_##BITS(const u8 *cur, const u8 *base, size_t count, u8 *out) {               \
    INDEPENDENT                                                                                  \
    for (size_t i = 0; i < count; ++i) {                                                         \
      u##BITS now, before, folded;                                                               \
      memcpy(&now, cur + i * (BITS / 8), BITS / 8);                                              \
      memcpy(&before, base + i * (BITS / 8), BITS / 8);                                          \
      const u##BITS difference = (u##BITS)(now - before);                                        \
      const u##BITS sign = (u##BITS)(0u - (u##BITS)(difference >> (BITS - 1)));                  \
      folded = (u##BITS)((u##BITS)(difference << 1) ^ sign);                                     \
      memcpy(out + i * (BITS / 8), &folded, BITS / 8);                                           \
    }                                                                                            \
  }                                                                                              \
  INLINE void undelta_##BITS(const u8 *folded, const u8 *base, size_t count, u8 *out) {          \
    INDEPENDENT                                                                                  \
    for (size_t i = 0; i < count; ++i) {                                                         \
      u##BITS code, before, now;                                                                 \
      memcpy(&code, folded + i * (BITS / 8), BITS / 8);                                          \
      memcpy(&before, base + i * (BITS / 8), BITS / 8);                                          \
      const u##BITS sign = (u##BITS)(0u - (u##BITS)(code & 1));                                  \
      now = (u##BITS)(before + (u##BITS)((u##BITS)(code >> 1) ^ sign));                          \
      memcpy(out + i * (BITS / 8), &now, BITS / 8);                                              \
    }                                                                                            \
  }
DELTA(8)
DELTA(16)
DELTA(32)
DELTA(64)

void gpuckpt_delta(const u8 *cur, const u8 *base, size_t count, size_t width, u8 *out) {
  switch (width) {
    case 1: delta_8(cur, base, count, out); break;
    case 2: delta_16(cur, base, count, out); break;
    case 4: delta_32(cur, base, count, out); break;
    case 8: delta_64(cur, base, count, out); break;
  }
}

void gpuckpt_undelta(const u8 *folded, const u8 *base, size_t count, size_t width, u8 *out) {
  switch (width) {
    case 1: undelta_8(folded, base, count, out); break;
    case 2: undelta_16(folded, base, count, out); break;
    case 4: undelta_32(folded, base, count, out); break;
    case 8: undelta_64(folded, base, count, out); break;
  }
}

void gpuckpt_delta_split(const u8 *cur, const u8 *base, size_t count, size_t width, u8 *out) {
  u8 folded[TILE];
  const size_t most = TILE / width;
  for (size_t at = 0; at < count; at += most) {
    const size_t some = count - at < most ? count - at : most;
    gpuckpt_delta(cur + at * width, base + at * width, some, width, folded);
    gpuckpt_split(folded, some, width, out + at, count);
  }
}

void gpuckpt_join_undelta(const u8 *const *planes, const u8 *base, size_t count, size_t width,
                          u8 *out) {
  u8 folded[TILE];
  const size_t most = TILE / width;
  for (size_t at = 0; at < count; at += most) {
    const size_t some = count - at < most ? count - at : most;
    const u8 *p[8];
    for (size_t k = 0; k < width; ++k) p[k] = planes[k] + at;
    gpuckpt_join(p, some, width, folded);
    gpuckpt_undelta(folded, base + at * width, some, width, out + at * width);
  }
}
