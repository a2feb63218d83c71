// Planes to Zstandard frames (RFC 8878) of literals alone, and how much of a plane are runs.
//
// A frame is a header and blocks of 16 KiB, each as it is, one byte repeated, or Huffman's codes in
// four streams, with a table of its own or the one before.  There are no matches, which in numbers
// cost more than they save.  Sections are the RFC's.
#include "codes.h"

// A block is coded if it gets smaller by this part: else it isn't worth the decoding.
enum { GAIN = 64 };
// Bytes from one place where runs are looked for to the next.
enum { RUNS = 256 };
// Codes are kept while they come this near to what new ones could, whose table takes room, too.
static const float ENOUGH = 1.01f;

// Of BLOCK bytes at most, added to counts.  Eight tables: equal bytes follow each other.
static void count_bytes(const u8 *from, size_t size, u32 *counts) {
  u16 parts[8][256] = {{0}};
  size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    u64 x;
    memcpy(&x, from + i, 8);
    for (u32 k = 0; k < 8; ++k) ++parts[k][x >> 8 * k & 0xff];
  }
  for (; i < size; ++i) ++parts[0][from[i]];
  for (u32 s = 0; s < 256; ++s)
    for (u32 k = 0; k < 8; ++k) counts[s] += parts[k][s];
}
INLINE u32 largest(const u32 *counts) {
  u32 most = 0;
  for (u32 s = 0; s < 256; ++s) most = counts[s] > most ? counts[s] : most;
  return most;
}
// Whether no byte is much more frequent than the others: codes then gain nothing.
INLINE int is_even(u32 most, size_t size) { return most <= (size >> 7) + 4; }

// Bytes that the codes take; more than any block has if a byte has none.
static size_t cost_of(const Codes *c, const u32 *counts) {
  size_t bits = 0;
  for (u32 s = 0; s < 256; ++s) {
    if (counts[s] && !c->lengths[s]) return 2 * BLOCK;
    bits += counts[s] * c->lengths[s];
  }
  return bits / 8;
}

// Codes as they are written to a stream: the last ones in the highest bits.
typedef struct {
  u64 bits;
  u32 count;
  u8 *to;
} Stream;

// 56 bits at most, before they are written out: what is below a code in its word counts as nothing.
INLINE void put(Stream *s, u64 code) {
  s->bits = s->bits >> (code & 63) | code;
  s->count += (u8)code;
}
// Writes whole bytes; 8 bytes are touched.  Fewer than 8 bits are left.
INLINE void write_out(Stream *s) {
  const u64 bits = s->bits >> ((64 - s->count) & 63);
  memcpy(s->to, &bits, 8);
  s->to += s->count / 8;
  s->count &= 7;
}
INLINE size_t close_stream(Stream *s, const u8 *begin) {
  put(s, 1ull << 63 | 1);
  write_out(s);
  return (size_t)(s->to - begin) + (s->count > 0);
}
// Two streams at a time, which don't wait for each other, from their last bytes on.  The second one
// isn't longer.
INLINE void write_two_with(const u8 *a, size_t size, const u8 *b, size_t other, const u64 *codes,
                           Stream *first, Stream *second) {
  Stream s = *first, t = *second;  // in registers
  for (; size > other; write_out(&s)) put(&s, codes[a[--size]]);
  for (; size % 4; write_out(&s), write_out(&t)) {
    put(&s, codes[a[--size]]);
    put(&t, codes[b[size]]);
  }
  for (; size; size -= 4) {
    for (size_t k = 1; k <= 4; ++k) {
      put(&s, codes[a[size - k]]);
      put(&t, codes[b[size - k]]);
    }
    write_out(&s);
    write_out(&t);
  }
  *first = s;
  *second = t;
}
#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
__attribute__((target("bmi2"))) static void write_two_by_bmi2(const u8 *a, size_t size, const u8 *b,
                                                             size_t other, const u64 *codes,
                                                             Stream *s, Stream *t) {
  write_two_with(a, size, b, other, codes, s, t);
}
#endif
static void write_two(const u8 *a, size_t size, const u8 *b, size_t other, const u64 *codes,
                      Stream *s, Stream *t) {
#if defined(__x86_64__) && !defined(GPUCKPT_PLAIN)
  if (__builtin_cpu_supports("bmi2")) {
    write_two_by_bmi2(a, size, b, other, codes, s, t);
    return;
  }
#endif
  write_two_with(a, size, b, other, codes, s, t);
}

// A block's four streams, behind the lengths of three of them.  Returns where they end.
static u8 *write_streams(const u8 *from, size_t size, const u64 *codes, u8 *to) {
  u8 second[BLOCK / 4 * LONGEST / 8 + 16], *sizes = to;
  const size_t part = (size + 3) / 4;
  to += 6;
  for (u32 k = 0; k < 4; k += 2) {
    const size_t other = k ? size - 3 * part : part;
    Stream s = {0, 0, to}, t = {0, 0, second};
    write_two(from + k * part, part, from + (k + 1) * part, other, codes, &s, &t);
    const size_t length = close_stream(&s, to), next = close_stream(&t, second);
    memcpy(to + length, second, next);
    const u16 lengths[2] = {(u16)length, (u16)next};
    memcpy(sizes + 2 * k, lengths, k ? 2 : 4);
    to += length + next;
  }
  return to;
}

// A block's header, whose contents are of kind 0: as they are, 1: one byte repeated, 2: coded.
INLINE u8 *write_header(u8 *to, int is_last, u32 kind, size_t size) {
  const u32 word = (u32)is_last | kind << 1 | (u32)size << 3;
  memcpy(to, &word, 3);
  return to + 3;
}

// A coded block: its literals (3.1.1.3.1), and a byte that says there are no sequences.  With
// `table` the codes' text is there; without, they are those of the coded block before.
static u8 *write_coded(const u8 *from, size_t size, const Codes *c, int table, int is_last,
                       u8 *to) {
  const u32 wide = size >= 1 << 14 ? 3 : size >= 1 << 10 ? 2 : 1;
  u8 *head = to + 3, *text = head + 2 + wide;
  if (table) memcpy(text, c->text, c->text_size);
  u8 *end = write_streams(from, size, c->codes, text + (table ? c->text_size : 0));
  const u64 kind = table ? 2 : 3, coded = (u64)(end - text);
  const u64 word = kind | wide << 2 | (u64)size << 4 | coded << (10 + 4 * wide);
  memcpy(head, &word, 2 + wide);
  *end++ = 0;
  write_header(to, is_last, 2, (size_t)(end - head));
  return end;
}

// log2 to within 0.01: the exponent, and a parabola.
INLINE float log2_of(u32 x) {
  float f = (float)x;
  u32 bits;
  memcpy(&bits, &f, 4);
  const float exponent = (float)(int)(bits >> 23) - 127;
  bits = (bits & 0x7fffff) | 0x3f800000;
  memcpy(&f, &bits, 4);
  return exponent + (2 - f / 3) * f - 5.0f / 3;
}
// Bytes that the best of codes could come down to: the block's entropy.
static float information(const u32 *counts, size_t size) {
  float sum = 0;
  for (u32 s = 0; s < 256; ++s) sum += (float)counts[s] * log2_of(counts[s] | !counts[s]);
  return ((float)size * log2_of((u32)size) - sum) / 8;
}

// What is known from block to block.
typedef struct {
  Codes codes[2];
  u32 kept;    // those of the last coded block; 2: there was none
  int is_raw;  // whether the last block is as it was
} Coder;

// Chooses codes for a block, new ones or those that were kept.  Returns bytes that it will take at
// most, or more than it has.
static size_t choose_codes(Coder *coder, size_t size, const u32 *counts, int *table) {
  const size_t heads = 24;  // headers, the streams' lengths and ends
  Codes *new = &coder->codes[coder->kept == 0];
  size_t other = 2 * BLOCK;
  *table = 0;
  if (size < 64 || is_even(largest(counts), size)) return other;
  if (coder->kept < 2) other = cost_of(&coder->codes[coder->kept], counts);
  const float least = information(counts, size);
  if (other < size && (float)other <= ENOUGH * coder->codes[coder->kept].over * least)
    return other + heads;
  if (gpuckpt_make_codes(counts, new)) {
    const size_t cost = cost_of(new, counts);
    *table = cost + new->text_size < other;
    new->over = (float)cost / (least + 1);
    if (*table) return cost + new->text_size + heads;
  }
  return other + heads;
}

// Whether a part of a block says that codes gain nothing.
static int seems_even(const u8 *from, size_t size) {
  const size_t some = 2048;
  u32 counts[256] = {0};
  if (size < 4 * some) return 0;
  count_bytes(from, some, counts);
  count_bytes(from + size - some, some, counts);
  return is_even(largest(counts), 2 * some);
}

static u8 *write_raw(const u8 *from, size_t size, int is_last, u8 *to, const u8 *limit) {
  if ((size_t)(limit - to) < size + 3) return 0;
  to = write_header(to, is_last, 0, size);
  memcpy(to, from, size);
  return to + size;
}

// A block in the way that takes the fewest bytes; where it ends, or 0 if it may not fit.
static u8 *write_block(const u8 *from, size_t size, Coder *coder, int is_last, u8 *to,
                       const u8 *limit) {
  u32 counts[256] = {0};
  int table;
  // After a block that gained nothing the next one mostly doesn't, either.
  if (coder->is_raw && seems_even(from, size)) return write_raw(from, size, is_last, to, limit);
  coder->is_raw = 0;
  count_bytes(from, size, counts);
  if (counts[from[0]] == size) {
    if (limit - to < 4) return 0;
    to = write_header(to, is_last, 1, size);
    *to = from[0];
    return to + 1;
  }
  const size_t cost = choose_codes(coder, size, counts, &table);
  if (cost + size / GAIN > size) {
    coder->is_raw = 1;
    return write_raw(from, size, is_last, to, limit);
  }
  if ((size_t)(limit - to) < cost + 8) return 0;
  if (table) coder->kept = coder->kept == 0;
  return write_coded(from, size, &coder->codes[coder->kept], table, is_last, to);
}

size_t gpuckpt_huffman(const u8 *plane, size_t size, u8 *out, size_t room) {
  static const u8 MAGIC_AND_WINDOW[6] = {0x28, 0xb5, 0x2f, 0xfd, 0x80, 0x20};
  const u32 size32 = (u32)size;
  const u8 *limit = out + room;
  Coder coder;
  if (!size || size != size32 || room < 10) return 0;
  memcpy(out, MAGIC_AND_WINDOW, 6);
  memcpy(out + 6, &size32, 4);
  u8 *to = out + 10;
  coder.kept = 2;
  coder.is_raw = 0;
  for (size_t at = 0; at < size && to; at += BLOCK) {
    const size_t some = size - at < BLOCK ? size - at : BLOCK;
    to = write_block(plane + at, some, &coder, at + some == size, to, limit);
  }
  return to ? (size_t)(to - out) : 0;
}

size_t gpuckpt_count_runs(const u8 *plane, size_t size) {
  size_t found = 0;
  for (size_t at = 0; at + RUNS <= size; at += RUNS) {
    u64 x;
    memcpy(&x, plane + at, 8);
    found += x == (x & 0xff) * 0x0101010101010101u;
  }
  return found;
}

// Counts that add up to a block's at most; those that occur, still do.
static void scale_counts(u32 *counts, size_t size) {
  u32 shift = 0;
  while (size >> shift > BLOCK / 2) ++shift;
  for (u32 s = 0; s < 256; ++s) counts[s] = counts[s] ? (counts[s] >> shift) + 1 : 0;
}

// A piece of a tile, with the first block's codes or as it is; where it ends, or 0 if it may not fit.
static u8 *write_piece(const u8 *from, size_t size, const Codes *codes, int is_last, u8 *to,
                       const u8 *limit) {
  if ((size_t)(limit - to) < size * LONGEST / 8 + 64) return 0;
  if (size >= 64) {
    u8 *end = write_coded(from, size, codes, 0, is_last, to);
    if ((size_t)(end - to) < size + 3) return end;
  }
  return write_raw(from, size, is_last, to, limit);
}

size_t gpuckpt_huffman_tiles(const u8 *plane, const u32 *sizes, size_t count, u8 *out, size_t room,
                             u32 *ends) {
  static const u8 MAGIC_AND_WINDOW[6] = {0x28, 0xb5, 0x2f, 0xfd, 0x80, 0x20};
  const u8 *limit = out + room;
  u32 counts[256] = {0};
  Codes codes;
  size_t size = 0;
  for (size_t t = 0; t < count; ++t) size += sizes[t];
  const u32 size32 = (u32)size;
  if (size != size32 || size <= FIRST_BLOCK || room < 1024) return 0;
  for (size_t at = 0; at < size; at += BLOCK)
    count_bytes(plane + at, size - at < BLOCK ? size - at : BLOCK, counts);
  if (is_even(largest(counts), size)) return 0;
  if (counts[plane[0]] == size) return 0;
  scale_counts(counts, size);
  if (!gpuckpt_make_codes(counts, &codes)) return 0;
  memcpy(out, MAGIC_AND_WINDOW, 6);
  memcpy(out + 6, &size32, 4);
  u8 *to = write_coded(plane, FIRST_BLOCK, &codes, 1, 0, out + 10);
  *ends++ = (u32)(to - out);
  size_t at = FIRST_BLOCK;
  for (size_t t = 0, end = 0; t < count; ++t) {
    end += sizes[t];
    while (at < end) {
      const size_t some = end - at < BLOCK ? end - at : BLOCK;
      to = write_piece(plane + at, some, &codes, at + some == size, to, limit);
      if (!to) return 0;
      at += some;
    }
    *ends++ = (u32)(to - out);
  }
  return (size_t)(to - out);
}
