// How long codes are, which they are, and how that is written.
#include "codes.h"

enum { STATES_LOG = 6, STATES = 1 << STATES_LOG };

// Bits that are written from the lowest one on; a decoder begins at the other end.
typedef struct {
  u64 bits;
  u32 count;
  u8 *to;
} Bits;

INLINE void add_bits(Bits *b, u64 value, u32 count) {
  b->bits |= value << b->count;
  b->count += count;
}
// Writes whole bytes; 8 bytes are touched.  Fewer than 8 bits are left.
INLINE void flush(Bits *b) {
  memcpy(b->to, &b->bits, 8);
  b->to += b->count / 8;
  b->bits >>= b->count & ~7u;
  b->count &= 7;
}
// A last bit says where the others end.
INLINE u8 *close_bits(Bits *b) {
  add_bits(b, 1, 1);
  flush(b);
  return b->to + (b->count > 0);
}

INLINE u32 highest_bit(u32 x) { return 31 - (u32)__builtin_clz(x); }

// The bytes that occur, the rarest first.  Returns their number.
static u32 sorted_bytes(const u32 *counts, u8 *bytes) {
  u8 half[256];
  u32 low[257] = {0}, high[257] = {0}, n = 0;
  for (u32 s = 0; s < 256; ++s)
    if (counts[s]) ++low[(counts[s] & 0xff) + 1], ++high[(counts[s] >> 8) + 1], ++n;
  for (u32 at = 0; at < 256; ++at) low[at + 1] += low[at], high[at + 1] += high[at];
  for (u32 s = 0; s < 256; ++s)
    if (counts[s]) half[low[counts[s] & 0xff]++] = (u8)s;
  for (u32 i = 0; i < n; ++i) bytes[high[counts[half[i]] >> 8]++] = half[i];
  return n;
}

// Lengths of Huffman's codes, by counts that ascend, in place: Moffat and Katajainen, "In-place
// calculation of minimum-redundancy codes" (1995).  n is 2 at least.
static void count_lengths(u32 *a, u32 n) {
  u32 root = 0, leaf = 2;
  a[0] += a[1];
  for (u32 next = 1; next + 1 < n; ++next) {
    if (leaf >= n || a[root] < a[leaf]) a[next] = a[root], a[root++] = next;
    else a[next] = a[leaf++];
    if (leaf >= n || (root < next && a[root] < a[leaf])) a[next] += a[root], a[root++] = next;
    else a[next] += a[leaf++];
  }
  a[n - 2] = 0;
  for (u32 next = n - 2; next-- > 0;) a[next] = a[a[next]] + 1;
  u32 there = 1, used = 0, depth = 0, inner = n - 1, next = n;
  while (there) {
    while (inner && a[inner - 1] == depth) ++used, --inner;
    for (; there > used; --there) a[--next] = depth;
    there = 2 * used, used = 0, ++depth;
  }
}

// Where those bytes begin, of all from the rarest on, that have codes of `length` bits.
INLINE u32 first_of(const u32 *of, u32 length) {
  u32 at = 0;
  for (u32 l = LONGEST; l > length; --l) at += of[l];
  return at;
}
// Makes codes that take `over` of 2^LONGEST too much room longer, where that costs the fewest bits
// for the room; returns how much too little they then take.
static u32 make_longer(u32 *of, const u32 *counts, u32 over) {
  for (;;) {
    u32 best = 0, frees = 0;
    double least = 0;
    for (u32 l = 1, at; l < LONGEST; ++l) {
      const u32 room = 1u << (LONGEST - 1 - l);
      if (!of[l]) continue;
      at = first_of(of, l);
      const double cost = (double)counts[at] / (room < over ? room : over);
      if (!best || cost < least) best = l, least = cost, frees = room;
    }
    --of[best], ++of[best + 1];
    if (frees >= over) return frees - over;
    over -= frees;
  }
}
// No code is longer than LONGEST, and all together are complete.  `counts` ascend.
static void limit_lengths(u32 *lengths, const u32 *counts, u32 n) {
  u32 of[LONGEST + 1] = {0}, total = 0, spare = 0;
  if (lengths[0] <= LONGEST) return;
  for (u32 i = 0; i < n; ++i) ++of[lengths[i] < LONGEST ? lengths[i] : LONGEST];
  for (u32 l = 1; l <= LONGEST; ++l) total += of[l] << (LONGEST - l);
  spare = make_longer(of, counts, total - (1u << LONGEST));
  for (u32 l = 2; spare; l = l < LONGEST ? l + 1 : 2) {
    const u32 room = 1u << (LONGEST - l);
    for (; of[l] && room <= spare; spare -= room) --of[l], ++of[l - 1];
  }
  for (u32 l = LONGEST, i = 0; l; --l)
    for (u32 k = 0; k < of[l]; ++k) lengths[i++] = l;
}

// Codes of one length follow each other; those of longer ones are less (4.2.1.3).  Returns the
// longest length.
static u32 assign_codes(Codes *c) {
  u32 of[LONGEST + 1] = {0}, first[LONGEST + 1], least = 0, longest = 0;
  for (u32 s = 0; s < 256; ++s) ++of[c->lengths[s]];
  for (u32 l = LONGEST; l; --l) {
    first[l] = least;
    least = (least + of[l]) >> 1;
    if (of[l] && !longest) longest = l;
  }
  for (u32 s = 0; s < 256; ++s) {
    const u32 l = c->lengths[s];
    c->codes[s] = l ? (u64)first[l]++ << (64 - l) | l : 0;
  }
  return longest;
}

// Shares of STATES for each weight, 1 at least of those that occur.  Returns how many occur.
static u32 share_states(const u8 *weights, u32 n, u32 *shares) {
  u32 counts[LONGEST + 2] = {0}, total = 0, kinds = 0;
  for (u32 i = 0; i < n; ++i) ++counts[weights[i]];
  for (u32 w = 0; w < LONGEST + 2; ++w) {
    shares[w] = (counts[w] * STATES + n / 2) / n;
    if (counts[w] && !shares[w]) shares[w] = 1;
    total += shares[w], kinds += counts[w] > 0;
  }
  while (total != STATES) {
    u32 most = 0;
    for (u32 w = 1; w < LONGEST + 2; ++w)
      if (shares[w] > shares[most]) most = w;
    if (total < STATES) ++shares[most], ++total;
    else --shares[most], --total;
  }
  return kinds;
}

// The shares as an FSE table's description (4.1.1).
static u8 *write_shares(const u32 *shares, u8 *to) {
  Bits b = {STATES_LOG - 5, 4, to};
  u32 left = STATES + 1, threshold = STATES, size = STATES_LOG + 1;
  for (u32 w = 0; left > 1;) {
    const u32 most = 2 * threshold - 1 - left, share = shares[w++];
    u32 code = share + 1;
    left -= share;
    if (code >= threshold) code += most;
    add_bits(&b, code, size - (code < most));
    flush(&b);
    for (; left < threshold && threshold > 1; threshold >>= 1) --size;
    if (share) continue;
    u32 zeros = 0;
    for (; left > 1 && !shares[w]; ++w) ++zeros;
    for (; zeros >= 3; zeros -= 3) add_bits(&b, 3, 2), flush(&b);
    add_bits(&b, zeros, 2), flush(&b);
  }
  return b.to + (b.count > 0);
}

// Weights as FSE codes with two states, which take turns (4.2.1.2).  Returns bytes, 0 if that can't
// be.  `to` has room for 256.
static size_t write_weights(const u8 *weights, u32 n, u8 *to) {
  u32 shares[LONGEST + 2], first[LONGEST + 2], states[2];
  u8 spread[STATES], order[STATES];
  if (n < 2 || share_states(weights, n, shares) < 2) return 0;
  for (u32 w = 0, at = 0, total = 0; w < LONGEST + 2; ++w) {
    first[w] = total, total += shares[w];
    for (u32 k = 0; k < shares[w]; ++k, at = (at + STATES / 2 + STATES / 8 + 3) % STATES)
      spread[at] = (u8)w;
  }
  u32 next[LONGEST + 2];
  memcpy(next, first, sizeof next);
  for (u32 at = 0; at < STATES; ++at) order[next[spread[at]]++] = (u8)at;
  Bits b = {0, 0, write_shares(shares, to)};
  for (u32 i = n; i-- > 0;) {
    const u32 w = weights[i], share = shares[w];
    u32 *state = &states[i % 2], to_emit = STATES_LOG - highest_bit(share);
    if (i + 2 >= n) {
      *state = order[first[w]];
      continue;
    }
    const u32 from = *state + STATES;
    if (from >> to_emit < share) --to_emit;
    add_bits(&b, from & ((1u << to_emit) - 1), to_emit);
    flush(&b);
    *state = order[first[w] + (from >> to_emit) - share];
  }
  add_bits(&b, states[1], STATES_LOG);
  add_bits(&b, states[0], STATES_LOG);
  return (size_t)(close_bits(&b) - to);
}

// The table's text: a weight for each byte but the last one that has a code (4.2.1.1).  Returns 0
// if there is no such text.
static size_t describe(Codes *c, u32 longest) {
  u8 weights[256], coded[512];
  u32 n = 255;
  while (!c->lengths[n]) --n;
  for (u32 s = 0; s < n; ++s) weights[s] = (u8)(c->lengths[s] ? longest + 1 - c->lengths[s] : 0);
  const size_t size = write_weights(weights, n, coded), plain = (n + 1) / 2;
  c->text_size = 0;
  if (size && size < 128 && (n > 128 || size < plain)) {
    c->text[0] = (u8)size;
    memcpy(c->text + 1, coded, size);
    c->text_size = 1 + size;
  } else if (n <= 128) {
    weights[n] = 0;
    c->text[0] = (u8)(127 + n);
    for (u32 i = 0; i < plain; ++i) c->text[1 + i] = (u8)(weights[2 * i] << 4 | weights[2 * i + 1]);
    c->text_size = 1 + plain;
  }
  return c->text_size;
}

int gpuckpt_make_codes(const u32 *counts, Codes *c) {
  u8 bytes[256];
  u32 lengths[256], ascending[256];
  const u32 n = sorted_bytes(counts, bytes);
  for (u32 i = 0; i < n; ++i) lengths[i] = ascending[i] = counts[bytes[i]];
  count_lengths(lengths, n);
  limit_lengths(lengths, ascending, n);
  memset(c->lengths, 0, sizeof c->lengths);
  for (u32 i = 0; i < n; ++i) c->lengths[bytes[i]] = (u8)lengths[i];
  return describe(c, assign_codes(c)) > 0;
}
