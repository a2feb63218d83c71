// Huffman's codes for one block of a Zstandard frame (RFC 8878), and their table.  Sections are the
// RFC's.
#ifndef GPUCKPT_CODES_H
#define GPUCKPT_CODES_H

#include "native.h"

enum { BLOCK = 1 << 14, LONGEST = 11, TABLE_MAX = 129 };

// The codes of a block.  lengths[s]: bits of byte s, 0 if it has none; codes[s]: the same, and the
// code in the highest bits.  text: the table as it is written.
typedef struct {
  u8 lengths[256];
  u64 codes[256];
  u8 text[TABLE_MAX];
  size_t text_size;
  float over;  // how much more than the entropy they took of the block that they were made for
} Codes;

// Makes codes for a block of which two bytes at least occur; counts[s]: how often s does.  Returns
// 0 if there is no text for their table.
int gpuckpt_make_codes(const u32 *counts, Codes *codes);

#endif
