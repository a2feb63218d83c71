// What a block of threads shares while it takes a leaf after the other.
struct Block {
  uint4 tiles[WARPS][TILE / UNIT];  // a warp's own
  u64 sums[LEAF / BLOCK * LANES];   // of the leaf's digest
  u64 keys[24];                     // XXH3's secret
  Chunk row;                        // the leaf's; these two are here so that they don't take
  Leaf leaf;                        // registers

  __device__ __forceinline__ uint4 *tile() { return tiles[threadIdx.x / 32]; }
};

// Once a launch; the first barrier of `begin_leaf` makes it known.
__device__ __forceinline__ void begin_block(Block &block) {
  if (threadIdx.x < 24) block.keys[threadIdx.x] = SECRET[threadIdx.x];
}
// All threads together; nobody uses the row of the leaf before any more.
__device__ __forceinline__ void begin_leaf(Block &block, const Chunk *__restrict__ chunks, u64 rows,
                                           u64 leaf) {
  const u64 row = row_of<Chunk, &Chunk::first_leaf>(chunks, rows, leaf);
  if (threadIdx.x == 0) {
    block.row = chunks[row];
    block.leaf = leaf_of(block.row, leaf);
  }
  __syncthreads();
}

// How many bytes of the leaf there are in the tile `in` bytes after its begin.
__device__ __forceinline__ u32 bytes_of(const Leaf &leaf, u32 in) {
  const u32 left = leaf.length - in;
  return left < TILE ? left : TILE;
}
