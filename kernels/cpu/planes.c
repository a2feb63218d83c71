// Chunks to planes and back.  Reference: gpuckpt/planes.py.
#include "native.h"

#ifndef GPUCKPT_VERSION
#define GPUCKPT_VERSION 5
#endif
u32 gpuckpt_version(void) { return GPUCKPT_VERSION; }

// An element's highest bit goes behind its lowest one; and back.
INLINE u16 turned_2(u16 x) { return (u16)(x << 1 | x >> 15); }
INLINE u32 turned_4(u32 x) { return x << 1 | x >> 31; }
INLINE u64 turned_8(u64 x) { return x << 1 | x >> 63; }
INLINE u16 unturned_2(u16 x) { return (u16)(x >> 1 | x << 15); }
INLINE u32 unturned_4(u32 x) { return x >> 1 | x << 31; }
INLINE u64 unturned_8(u64 x) { return x >> 1 | x << 63; }

// By tiles: they are turned in the nearest cache, where compilers make vectors of both passes.
#define TURN(WIDTH, BITS, TURNED)                                                              \
  INLINE void TURNED##_all_##WIDTH(const u8 *in, size_t count, u8 *out) {                      \
    INDEPENDENT                                                                                \
    for (size_t i = 0; i < count; ++i) {                                                       \
      u##BITS x;                                                                               \
      memcpy(&x, in + i * WIDTH, WIDTH);                                                       \
      x = TURNED##_##WIDTH(x);                                                                 \
      memcpy(out + i * WIDTH, &x, WIDTH);                                                      \
    }                                                                                          \
  }
TURN(2, 16, turned)
TURN(4, 32, turned)
TURN(8, 64, turned)
TURN(2, 16, unturned)
TURN(4, 32, unturned)
TURN(8, 64, unturned)

INLINE void split_2(const u8 *restrict raw, size_t count, u8 *restrict a, u8 *restrict b) {
  for (size_t i = 0; i < count; ++i) {
    a[i] = raw[2 * i];
    b[i] = raw[2 * i + 1];
  }
}

INLINE void split_4(const u8 *restrict raw, size_t count, u8 *restrict a, u8 *restrict b,
                    u8 *restrict c, u8 *restrict d) {
  for (size_t i = 0; i < count; ++i) {
    a[i] = raw[4 * i];
    b[i] = raw[4 * i + 1];
    c[i] = raw[4 * i + 2];
    d[i] = raw[4 * i + 3];
  }
}

// Compilers don't vectorise eight planes at once; halves of elements, twice four, they do.
static void split_8(const u8 *restrict raw, size_t count, u8 *restrict out, size_t stride) {
  u32 low[TILE / 8], high[TILE / 8];
  for (size_t at = 0; at < count; at += TILE / 8) {
    const size_t some = count - at < TILE / 8 ? count - at : TILE / 8;
    for (size_t i = 0; i < some; ++i) {
      memcpy(low + i, raw + 8 * (at + i), 4);
      memcpy(high + i, raw + 8 * (at + i) + 4, 4);
    }
    u8 *first = out + at, *second = out + 4 * stride + at;
    split_4((const u8 *)low, some, first, first + stride, first + 2 * stride, first + 3 * stride);
    split_4((const u8 *)high, some, second, second + stride, second + 2 * stride,
            second + 3 * stride);
  }
}

void gpuckpt_split_turned(const u8 *raw, size_t count, size_t width, u8 *out, size_t stride) {
  u8 tile[TILE];
  const size_t most = TILE / width;
  for (size_t at = 0; at < count; at += most) {
    const size_t some = count - at < most ? count - at : most;
    switch (width) {
      case 2: turned_all_2(raw + at * width, some, tile); break;
      case 4: turned_all_4(raw + at * width, some, tile); break;
      case 8: turned_all_8(raw + at * width, some, tile); break;
    }
    gpuckpt_split(tile, some, width, out + at, stride);
  }
}

void gpuckpt_split(const u8 *raw, size_t count, size_t width, u8 *out, size_t stride) {
  switch (width) {
    case 1: memcpy(out, raw, count); break;
    case 2: split_2(raw, count, out, out + stride); break;
    case 4: split_4(raw, count, out, out + stride, out + 2 * stride, out + 3 * stride); break;
    case 8: split_8(raw, count, out, stride); break;
  }
}

INLINE void join_2(const u8 *restrict a, const u8 *restrict b, size_t count, u8 *restrict out) {
  for (size_t i = 0; i < count; ++i) {
    out[2 * i] = a[i];
    out[2 * i + 1] = b[i];
  }
}

INLINE void join_4(const u8 *restrict a, const u8 *restrict b, const u8 *restrict c,
                   const u8 *restrict d, size_t count, u8 *restrict out) {
  for (size_t i = 0; i < count; ++i) {
    out[4 * i] = a[i];
    out[4 * i + 1] = b[i];
    out[4 * i + 2] = c[i];
    out[4 * i + 3] = d[i];
  }
}

INLINE void join_8(const u8 *restrict a, const u8 *restrict b, const u8 *restrict c,
                   const u8 *restrict d, const u8 *restrict e, const u8 *restrict f,
                   const u8 *restrict g, const u8 *restrict h, size_t count, u8 *restrict out) {
  for (size_t i = 0; i < count; ++i) {
    out[8 * i] = a[i];
    out[8 * i + 1] = b[i];
    out[8 * i + 2] = c[i];
    out[8 * i + 3] = d[i];
    out[8 * i + 4] = e[i];
    out[8 * i + 5] = f[i];
    out[8 * i + 6] = g[i];
    out[8 * i + 7] = h[i];
  }
}

void gpuckpt_join(const u8 *const *planes, size_t count, size_t width, u8 *out) {
  const u8 *const *p = planes;
  switch (width) {
    case 1: memcpy(out, p[0], count); break;
    case 2: join_2(p[0], p[1], count, out); break;
    case 4: join_4(p[0], p[1], p[2], p[3], count, out); break;
    case 8: join_8(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], count, out); break;
  }
}

void gpuckpt_join_turned(const u8 *const *planes, size_t count, size_t width, u8 *out) {
  u8 tile[TILE];
  const size_t most = TILE / width;
  for (size_t at = 0; at < count; at += most) {
    const size_t some = count - at < most ? count - at : most;
    const u8 *p[8];
    for (size_t k = 0; k < width; ++k) p[k] = planes[k] + at;
    gpuckpt_join(p, some, width, tile);
    switch (width) {
      case 2: unturned_all_2(tile, some, out + at * width); break;
      case 4: unturned_all_4(tile, some, out + at * width); break;
      case 8: unturned_all_8(tile, some, out + at * width); break;
    }
  }
}
