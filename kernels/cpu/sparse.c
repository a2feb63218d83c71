// Planes of which most bytes are zero.  Reference: gpuckpt/sparse.py.
#include "native.h"

#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
#include <immintrin.h>
#define WORDS __attribute__((target("bmi2,popcnt")))
#endif

// With fewer of 64 bytes that aren't zero, each is done alone: some machines' words are slow.
enum { FEW = 8 };

#if defined(__SSE2__) && !defined(GPUCKPT_PLAIN)
#include <emmintrin.h>

// Of 64 bytes, in the order of memory: those that aren't zero, as bits 0 ... 63.
INLINE u64 set_of_64(const u8 *bytes) {
  u64 set = 0;
  for (int k = 0; k < 4; ++k) {
    const __m128i some = _mm_loadu_si128((const __m128i *)(bytes + 16 * k));
    const int zero = _mm_movemask_epi8(_mm_cmpeq_epi8(some, _mm_setzero_si128()));
    set |= (u64)(~zero & 0xffff) << 16 * k;
  }
  return set;
}
#else
INLINE u64 set_of_64(const u8 *bytes) {
  u64 set = 0;
  for (int k = 0; k < 8; ++k) {
    u64 word;
    memcpy(&word, bytes + 8 * k, 8);
    const u64 low = 0x7f7f7f7f7f7f7f7f;
    const u64 ones = (((word & low) + low) | word) >> 7 & 0x0101010101010101;
    set |= (ones * 0x0102040810204080 >> 56) << 8 * k;
  }
  return set;
}
#endif

size_t gpuckpt_count_nonzero(const u8 *plane, size_t size) {
  size_t count = 0, at = 0;
  while (size - at >= 64) {
    // A byte counts up to 255, so that vectors of bytes do for as many rounds.
    u8 found[64] = {0};
    const size_t rounds = (size - at) / 64 < 255 ? (size - at) / 64 : 255;
    for (size_t r = 0; r < rounds; ++r, at += 64)
      for (size_t i = 0; i < 64; ++i) found[i] = (u8)(found[i] + (plane[at + i] != 0));
    for (size_t i = 0; i < 64; ++i) count += found[i];
  }
  for (; at < size; ++at) count += plane[at] != 0;
  return count;
}

// What 64 bytes of a plane become, and back.  Both return the end of what they packed or unpacked.
typedef u8 *Pack(const u8 *bytes, u64 set, u8 *to);
typedef const u8 *Unpack(u8 *bytes, u64 set, const u8 *from);

INLINE u8 *pack_64(const u8 *bytes, u64 set, u8 *to) {
  for (; set; set &= set - 1) *to++ = bytes[__builtin_ctzll(set)];
  return to;
}

INLINE const u8 *unpack_64(u8 *bytes, u64 set, const u8 *from) {
  memset(bytes, 0, 64);
  for (; set; set &= set - 1) bytes[__builtin_ctzll(set)] = *from++;
  return from;
}

// `wide` may write, or read, 64 bytes of `packed` whatever is set, so it does only if they are there.
INLINE size_t pack_all(const u8 *plane, size_t size, u8 *bitmap, u8 *packed, size_t room,
                       Pack wide) {
  size_t count = 0, at = 0;
  for (; size - at >= 64; at += 64) {
    const u64 set = set_of_64(plane + at);
    memcpy(bitmap + at / 8, &set, 8);
    const size_t found = (size_t)__builtin_popcountll(set);
    count += found;
    if (count > room) continue;
    u8 *to = packed + (count - found);
    if (found == 64)
      memcpy(to, plane + at, 64);
    else if (found < FEW || room - (count - found) < 64)
      pack_64(plane + at, set, to);
    else
      wide(plane + at, set, to);
  }
  for (; at < size; ++at) {
    if (at % 8 == 0) bitmap[at / 8] = 0;
    if (!plane[at]) continue;
    bitmap[at / 8] = (u8)(bitmap[at / 8] | 1u << at % 8);
    if (count < room) packed[count] = plane[at];
    ++count;
  }
  return count;
}

INLINE int unpack_all(const u8 *bitmap, const u8 *packed, size_t count, u8 *out, size_t size,
                      Unpack wide) {
  size_t at = 0;
  for (; size - at >= 64; at += 64) {
    u64 set;
    memcpy(&set, bitmap + at / 8, 8);
    const size_t found = (size_t)__builtin_popcountll(set);
    if (found > count) return 0;
    if (found == 64)
      memcpy(out + at, packed, 64);
    else if (found < FEW || count < 64)
      unpack_64(out + at, set, packed);
    else
      wide(out + at, set, packed);
    packed += found;
    count -= found;
  }
  for (; at < size; ++at) {
    const size_t set = bitmap[at / 8] >> at % 8 & 1;
    if (set > count) return 0;
    out[at] = set ? *packed : 0;
    packed += set;
    count -= set;
  }
  const int spare = size % 8 ? bitmap[size / 8] >> size % 8 : 0;
  return count == 0 && spare == 0;
}

#ifdef WORDS
// Eight bytes at a time: those whose bits are set, one after the other, are one instruction.
WORDS static u8 *pack_words(const u8 *bytes, u64 set, u8 *to) {
  for (int k = 0; k < 64; k += 8) {
    u64 word;
    memcpy(&word, bytes + k, 8);
    const u64 bits = set >> k & 0xff;
    word = _pext_u64(word, 255 * _pdep_u64(bits, 0x0101010101010101));
    memcpy(to, &word, 8);
    to += __builtin_popcountll(bits);
  }
  return to;
}

WORDS static const u8 *unpack_words(u8 *bytes, u64 set, const u8 *from) {
  for (int k = 0; k < 64; k += 8) {
    u64 word;
    memcpy(&word, from, 8);
    const u64 bits = set >> k & 0xff;
    word = _pdep_u64(word, 255 * _pdep_u64(bits, 0x0101010101010101));
    memcpy(bytes + k, &word, 8);
    from += __builtin_popcountll(bits);
  }
  return from;
}

WORDS static size_t pack_by_words(const u8 *plane, size_t size, u8 *bitmap, u8 *packed,
                                  size_t room) {
  return pack_all(plane, size, bitmap, packed, room, pack_words);
}

WORDS static int unpack_by_words(const u8 *bitmap, const u8 *packed, size_t count, u8 *out,
                                 size_t size) {
  return unpack_all(bitmap, packed, count, out, size, unpack_words);
}

static int has_words(void) {
  return __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}
#endif

size_t gpuckpt_pack_sparse(const u8 *plane, size_t size, u8 *bitmap, u8 *packed, size_t room) {
#ifdef WORDS
  if (has_words()) return pack_by_words(plane, size, bitmap, packed, room);
#endif
  return pack_all(plane, size, bitmap, packed, room, pack_64);
}

int gpuckpt_unpack_sparse(const u8 *bitmap, const u8 *packed, size_t count, u8 *out, size_t size) {
#ifdef WORDS
  if (has_words()) return unpack_by_words(bitmap, packed, count, out, size);
#endif
  return unpack_all(bitmap, packed, count, out, size, unpack_64);
}
