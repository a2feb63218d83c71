// What gather.cu and scatter.cu share: the table of runs, and where an element lies.
//
// A run is a piece of a tensor's bytes in C order, of whole items; the tensor itself lies in memory
// in any order.  gpuckpt/devices/strided.py makes items as large as alignment allows, and axes few.
// A block takes 16 KiB of a run at a time, a thread 16 bytes of them.
constexpr u32 PIECE = 16384, AXES = 32;

// A row of the table.  gpuckpt/devices/strided.py has the same as RUN.
struct Run {
  u64 tensor;         //   0  address of element [0, ..., 0]: a multiple of itemsize
  u64 packed;         //   8  address of the packed bytes: a multiple of itemsize
  u64 start;          //  16  index of the run's first item, in C order
  u64 count;          //  24  items
  u64 first_piece;    //  32  pieces of all rows before: of 16 KiB each, the last one rounded up
  u64 shape[AXES];    //  40  items along each axis; the last varies fastest
  i64 strides[AXES];  // 296  bytes from an item to the next: multiples of itemsize, also 0 or below
  u32 itemsize;       // 552  1, 2, 4, 8 or 16 bytes
  u32 axes;           // 556
};
static_assert(sizeof(Run) == 560 && alignof(Run) == 8, "");
static_assert(LIES(Run, shape, 40) && LIES(Run, axes, 556), "");

// Where an item lies.
struct Place {
  u64 at;    // its address
  u64 left;  // how many items there are from it to the end of the last axis
};
// By the item's index in C order: a division an axis, of 32 bits where that does.
__device__ __forceinline__ Place place_of(const Run &run, u64 index) {
  Place place = {run.tensor, 1};
#pragma unroll 1
  for (u32 axis = run.axes; axis-- > 0;) {
    const u64 extent = run.shape[axis];
    u64 along = index, over = 0;
    if (axis) {
      over = (index | extent) >> 32 ? index / extent : (u32)index / (u32)extent;
      along -= over * extent;
    }
    if (axis + 1 == run.axes) place.left = extent - along;
    place.at += along * (u64)run.strides[axis];
    index = over;
  }
  return place;
}

// Bytes from an item to the next along the last axis.
__device__ __forceinline__ u64 last_stride(const Run &run) {
  return run.axes ? (u64)run.strides[run.axes - 1] : 0;
}

// Moves a piece's items between the tensor and packed bytes: by Move::unit, as many as are 16
// packed bytes and lie along the last axis, or by Move::one.
template <class Item, class Move>
__device__ __forceinline__ void move_piece(const Run &run, u64 piece) {
  constexpr u32 COUNT = UNIT / sizeof(Item);
  const u64 stride = last_stride(run);
  u64 first = piece * (PIECE / sizeof(Item)) + threadIdx.x * COUNT;
#pragma unroll 1
  for (u32 i = 0; i < PIECE / UNIT / THREADS && first < run.count; ++i, first += THREADS * COUNT) {
    const u32 there = run.count - first < COUNT ? (u32)(run.count - first) : COUNT;
#pragma unroll 1
    for (u32 done = 0; done < there;) {
      const Place place = place_of(run, run.start + first + done);
      const u64 packed = run.packed + (first + done) * sizeof(Item);
      const u32 near = place.left < there - done ? (u32)place.left : there - done;
      if (near == COUNT) {
        Move::template unit<Item>(place.at, stride, packed);
      } else {
#pragma unroll 1
        for (u32 k = 0; k < near; ++k)
          Move::template one<Item>(place.at + k * stride, packed + k * sizeof(Item));
      }
      done += near;
    }
  }
}
template <class Move>
__device__ __forceinline__ void move_pieces(const Run *__restrict__ runs, u64 rows, u64 pieces) {
  for (u64 at = blockIdx.x; at < pieces; at += gridDim.x) {
    const Run &run = runs[row_of<Run, &Run::first_piece>(runs, rows, at)];
    const u64 piece = at - run.first_piece;
    switch (run.itemsize) {
      case 1: move_piece<u8, Move>(run, piece); break;
      case 2: move_piece<u16, Move>(run, piece); break;
      case 4: move_piece<u32, Move>(run, piece); break;
      case 8: move_piece<u64, Move>(run, piece); break;
      case 16: move_piece<uint4, Move>(run, piece); break;
    }
  }
}

// Items of one size within 16 bytes.
template <class Item> struct Unit {
  static constexpr u32 COUNT = UNIT / sizeof(Item);
  u64 halves[2] = {0, 0};

  __device__ __forceinline__ void set(u32 k, Item item) {
    halves[k * sizeof(Item) / 8] |= (u64)item << k * sizeof(Item) % 8 * 8;
  }
  __device__ __forceinline__ Item get(u32 k) const {
    return (Item)(halves[k * sizeof(Item) / 8] >> k * sizeof(Item) % 8 * 8);
  }
  __device__ __forceinline__ uint4 all() const {
    return make_uint4((u32)halves[0], (u32)(halves[0] >> 32), (u32)halves[1],
                      (u32)(halves[1] >> 32));
  }
  __device__ __forceinline__ void set_all(uint4 v) {
    halves[0] = (u64)v.y << 32 | v.x;
    halves[1] = (u64)v.w << 32 | v.z;
  }
};
template <> struct Unit<uint4> {
  static constexpr u32 COUNT = 1;
  uint4 only = {0, 0, 0, 0};

  __device__ __forceinline__ void set(u32, uint4 item) { only = item; }
  __device__ __forceinline__ uint4 get(u32) const { return only; }
  __device__ __forceinline__ uint4 all() const { return only; }
  __device__ __forceinline__ void set_all(uint4 v) { only = v; }
};
