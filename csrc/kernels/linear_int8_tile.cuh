// linear_int8 and linear_fp8 on a GPU, by mma.sync of 8-bit numbers, products in one launch. A block makes 128 rows
// with 128 columns, 64 of the depth at a time, from three stages of shared memory. Weights in 4 bits become 8-bit
// integers in registers, in about as many instructions as the tensor cores take cycles for their products; for that a
// warp has all rows of the block and a quarter of its columns, so that each is unpacked once.
#pragma once
#include "common/mma_fp8.cuh"
#include "kernels/int4_tile.h"
#include "kernels/linear_int8.h"

namespace qif {
namespace gpu {

constexpr int kProductThreads = 128, kStages = 3;
constexpr int kBlockTiles = 8;  // of 16 rows, and panels of 16 columns
constexpr int kTileBytes = kInt8Rows * kInt8Depth, kMostProducts = 8;

// Which numbers are multiplied: integers, with weights in 8 or in 4 bits, or float8.
struct Int8 {};
struct Int4 {};
struct E4m3 {};
template <class Numbers>
constexpr bool kIsFour = std::is_same<Numbers, Int4>::value;
template <class Numbers>
constexpr bool kIsFloat = std::is_same<Numbers, E4m3>::value;
template <class Numbers>
using SumOf = std::conditional_t<kIsFloat<Numbers>, float, int32_t>;

// How the four warps share a block. A lane has four columns of each panel, kRun of them neighbours. In float8 each has
// all rows, too: where numbers become float16 on the way (mma_fp8.cuh), panels of a warp take twice the registers.
template <bool Four, bool Float = false>
struct Shape {
  static constexpr int kAcross = Four || Float ? 4 : 2;
  static constexpr int kTiles = kBlockTiles * kAcross / 4, kPanels = kBlockTiles / kAcross;  // of a warp
  static constexpr int kPanelBytes = Four ? kInt4Tile : kTileBytes;
  static constexpr int kStageBytes = kBlockTiles * (kTileBytes + kPanelBytes);
  static constexpr int kRun = Four ? 2 : 4;
};

struct ProductPlaces {
  Int8Product product[kMostProducts];
  uint32_t end[kMostProducts];  // blocks up to the last of each
  bool wide[kMostProducts];     // runs of columns are read and written at once
};

// Pieces of a stage by turns, of float8 one after another, whose products leave no registers for several at once.
template <bool Float, class F>
QIF_INLINE void for_pieces(int pieces, F f) {
  if constexpr (Float) {
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces; i += kProductThreads) f(i);
  } else {
    for (int i = threadIdx.x; i < pieces; i += kProductThreads) f(i);
  }
}

// Pieces of 16 bytes of a stage: 64 numbers of the depth from `step` on of the rows from tile `row` on, and of panels
// from `panel` on. Pieces of a row are exchanged, and of columns the even ones come before the odd ones, so that those
// read together lie in different banks.
template <bool Four, bool Float>
QIF_INLINE void copy_stage(Shared<uint8_t> to, const Int8Product& p, int64_t row, int64_t panel, int step, int steps) {
  auto piece_of = [](int r, int piece) { return r * kInt8Depth + (piece ^ (r >> 1 & 3)) * 16; };
  for_pieces<Float>(kBlockTiles * kTileBytes / 16, [&](int i) {
    const int tile = i / 64, r = i / 4 % 16, piece = i % 4;
    const int64_t at = (row + tile) * kInt8Rows + r;
    const bool valid = at < p.rows;
    const uint8_t* from = p.values + at * p.depth + step * kInt8Depth + piece * 16;
    copy_async(to + tile * kTileBytes + piece_of(r, piece), valid ? from : p.values, valid);
  });
  const Shared<uint8_t> panels = to + kBlockTiles * kTileBytes;
  const uint8_t* weight = reinterpret_cast<const uint8_t*>(p.weight);
  constexpr int kPanelBytes = Shape<Four>::kPanelBytes, kPieces = kPanelBytes / 16;
  for_pieces<Float>(kBlockTiles * kPieces, [&](int i) {
    const int n = i / kPieces, c = i / 4 % 16, piece = Four ? i % kPieces : i % 4;
    const int64_t column = (panel + n) * kInt8Columns + (Four ? 0 : c);
    const bool valid = column < p.columns;
    const uint8_t* from = Four ? weight + ((panel + n) * steps + step) * kPanelBytes + piece * 16
                               : weight + column * p.depth + step * kInt8Depth + piece * 16;
    const int at = Four ? piece * 16 : piece_of(c % 2 * 8 + c / 2, piece);
    copy_async(panels + n * kPanelBytes + at, valid ? from : weight, valid);
  });
}

// (level + 127) / 2 of four levels, in bytes: 7 bits, whose highest is zero.
constexpr uint32_t half_levels(int first) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>((kInt4Levels[first + i] + 127) / 2) << 8 * i;
  return word;
}
constexpr uint32_t kLevels0 = half_levels(0), kLevels4 = half_levels(4), kLevels8 = half_levels(8),
                   kLevels12 = half_levels(12);

// Four numbers of a column: (level * times + 64) >> 7 for each level. `levels` are halves as above, two in a word.
QIF_INLINE uint32_t numbers_of(uint32_t levels01, uint32_t levels23, uint32_t times) {
  // In 16 bits 2 level times + 128, of which the number is the upper byte, and 2^15 that keeps it from being negative.
  const uint32_t rest = 0x80808080u - times * 0x00fe00feu;
  const uint32_t a = levels01 * (4 * times) + rest, b = levels23 * (4 * times) + rest;
  return permute_bytes(a, b, 0x7531) ^ 0x80808080u;
}

// The words of the right operand of a panel for a half of its tile's depth: first of the columns, then of the depth.
template <bool Four>
QIF_INLINE void load_columns(Shared<uint8_t> panel, int half, uint32_t (&words)[2][2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (Four) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int quad = 8 * half + 4 * h + t;
      const uint32_t codes = shared_cast<uint32_t>(panel)[8 * quad + g], others = codes ^ 0x88888888u;
      const Shared<uint8_t> times = panel + kInt4Codes + quad / 4 * 16 + g;
      // Of both columns by turns. Codes below 8 name a level of the lower half, in the upper one a highest bit, zero.
      const uint32_t levels01 = permute_bytes(kLevels0, kLevels4, codes) | permute_bytes(kLevels8, kLevels12, others);
      const uint32_t levels23 =
          permute_bytes(kLevels0, kLevels4, codes >> 16) | permute_bytes(kLevels8, kLevels12, others >> 16);
      words[0][h] = numbers_of(levels01 & 0x00ff00ffu, levels23 & 0x00ff00ffu, times[0]);
      words[1][h] = numbers_of(levels01 >> 8 & 0x00ff00ffu, levels23 >> 8 & 0x00ff00ffu, times[8]);
    }
  } else {
    // Matrices of eight columns, even or odd ones, and 16 of the depth.
    const int column = lane / 16 * 8 + lane % 8, piece = 2 * half + lane / 8 % 2;
    uint32_t four[4];
    load_matrices<false>(panel + column * kInt8Depth + (piece ^ (column >> 1 & 3)) * 16, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i / 2][i % 2] = four[i];
  }
}

// Of a lane's value i of a panel: its column there. In 8 bits the two products of a panel have its even and its odd
// columns.
template <bool Four>
QIF_INLINE int column_of(int i) {
  const int t = threadIdx.x % 4;
  return Four ? i / 2 * 8 + 2 * t + i % 2 : 4 * t + i;
}
template <bool Four, class Sum>
QIF_INLINE Sum sum_of(const Sum (&sums)[2][4], int i, int half) {
  return Four ? sums[i / 2][2 * half + i % 2] : sums[i % 2][2 * half + i / 2];
}

// Runs of a lane's columns: at once where `wide`, else one by one; columns that are not there are left.
template <int Run, class T>
QIF_INLINE void load_runs(const T* row, const int64_t (&column)[4], int64_t columns, bool wide, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += Run) {
    float run[Run] = {};
    if (wide) {
      if (column[i] < columns) load(row + column[i], run);
    } else {
#pragma unroll
      for (int j = 0; j < Run; ++j) {
        float one[1] = {0.0f};
        if (column[i + j] < columns) load(row + column[i + j], one);
        run[j] = one[0];
      }
    }
#pragma unroll
    for (int j = 0; j < Run; ++j) v[i + j] = run[j];
  }
}

template <int Run, class T>
QIF_INLINE void store_runs(T* row, const int64_t (&column)[4], int64_t columns, bool wide, const float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += Run) {
    float run[Run];
#pragma unroll
    for (int j = 0; j < Run; ++j) run[j] = v[i + j];
    if (wide) {
      if (column[i] < columns) store(row + column[i], run);
    } else {
#pragma unroll
      for (int j = 0; j < Run; ++j) {
        const float one[1] = {run[j]};
        if (column[i + j] < columns) store(row + column[i + j], one);
      }
    }
  }
}

template <class T, class Numbers>
__global__ void __launch_bounds__(kProductThreads, 2) linear_int8_tile(const __grid_constant__ ProductPlaces places) {
  constexpr bool Four = kIsFour<Numbers>, Float = kIsFloat<Numbers>;
  using S = Shape<Four, Float>;
  int which = 0;
  while (blockIdx.x >= places.end[which]) ++which;
  const Int8Product& p = places.product[which];
  // Blocks that run together share rows and columns: eight blocks of rows, then the next columns of these.
  const uint32_t block = blockIdx.x - (which ? places.end[which - 1] : 0);
  const uint32_t down = static_cast<uint32_t>((p.rows + 127) / 128);
  const uint32_t across = static_cast<uint32_t>((p.columns + 127) / 128);
  const uint32_t group = block / (8 * across), height = down - 8 * group < 8 ? down - 8 * group : 8;
  const uint32_t within = block - group * 8 * across;
  const int64_t tile = int64_t{8 * group + within % height} * kBlockTiles;
  const int64_t panel = int64_t{within / height} * kBlockTiles;

  const Shared<uint8_t> memory = dynamic_shared<uint8_t>();
  const int steps = static_cast<int>(p.depth / kInt8Depth);
  auto copy = [&](int step) {
    if (step < steps) copy_stage<Four, Float>(memory + step % kStages * S::kStageBytes, p, tile, panel, step, steps);
    commit_copies();
  };
  for (int s = 0; s < kStages - 1; ++s) copy(s);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own_tile = warp / S::kAcross * S::kTiles, own_panel = warp % S::kAcross * S::kPanels;
  const int row = lane % 16;  // of a tile, whose 16 bytes this lane names for load_matrices
  SumOf<Numbers> sums[S::kTiles][S::kPanels][2][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // also, all have used the stage that is filled next
    copy(step + kStages - 1);
    const Shared<uint8_t> stage = memory + step % kStages * S::kStageBytes;
    const Shared<uint8_t> rows = stage + own_tile * kTileBytes + row * 64;
    const Shared<uint8_t> panels = stage + kBlockTiles * kTileBytes + own_panel * S::kPanelBytes;
#pragma unroll(Float ? 1 : 2)
    for (int half = 0; half < 2; ++half) {
      uint32_t b[S::kPanels][2][2];
#pragma unroll
      for (int n = 0; n < S::kPanels; ++n) load_columns<Four>(panels + n * S::kPanelBytes, half, b[n]);
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m) {
        uint32_t a[4];
        load_matrices<false>(rows + m * kTileBytes + ((2 * half + lane / 16) ^ (row >> 1 & 3)) * 16, a);
#pragma unroll
        for (int n = 0; n < S::kPanels; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if constexpr (Float)
              multiply_add_e4m3(a, b[n][i][0], b[n][i][1], sums[m][n][i]);
            else
              multiply_add(a, b[n][i][0], b[n][i][1], sums[m][n][i]);
      }
    }
  }
  wait_copies<0>();

  const bool wide = places.wide[which];
  int64_t column[S::kPanels][4];
  float scale[S::kPanels][4], bias[S::kPanels][4];
  int32_t offset[S::kPanels][4];  // of rows that are stored as unsigned integers
#pragma unroll
  for (int n = 0; n < S::kPanels; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = (panel + own_panel + n) * kInt8Columns + column_of<Four>(i);
      const bool there = c < p.columns;
      float one[1] = {0.0f};
      if (p.bias && there) load(static_cast<const T*>(p.bias) + c, one);
      column[n][i] = c;
      bias[n][i] = one[0];
      scale[n][i] = there ? load_global(p.weight_scales + c) : 0.0f;
      if constexpr (!Float) offset[n][i] = there ? load_global(p.sums + c) * 128 : 0;
    }
  const Segments segments{p.offsets, p.rows, p.segments};
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = (tile + own_tile + m) * kInt8Rows + 8 * half + lane / 4;
      if (r >= p.rows) continue;
      const float of_row = load_global(p.scales + r);
      const T* gate = nullptr;
      if (p.residual) gate = static_cast<const T*>(p.gate) + segments.find(r) * p.gate_stride;
#pragma unroll
      for (int n = 0; n < S::kPanels; ++n) {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          auto sum = sum_of<Four>(sums[m][n], i, half);
          if constexpr (!Float) sum -= offset[n][i];
          y[i] = plus(times(static_cast<float>(sum), times(scale[n][i], of_row)), bias[n][i]);
        }
        if (p.residual) {
          float before[4], by[4];
          load_runs<S::kRun>(static_cast<const T*>(p.residual) + r * p.columns, column[n], p.columns, wide, before);
          load_runs<S::kRun>(gate, column[n], p.columns, wide, by);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            y[i] = plus(before[i], times(by[i], y[i]));
            if constexpr (std::is_same<T, Half>::value) {
              y[i] = y[i] > 65504.0f ? 65504.0f : y[i];
              y[i] = y[i] < -65504.0f ? -65504.0f : y[i];
            }
          }
        }
        store_runs<S::kRun>(static_cast<T*>(p.out) + r * p.columns, column[n], p.columns, wide, y);
      }
    }
}

// Products of one kind, in as few launches as there may be.
template <class T, class Numbers>
static int products_of(const std::vector<Int8Product>& products, void* stream) {
  constexpr bool Four = kIsFour<Numbers>;
  ProductPlaces places = {};
  int count = 0;
  uint32_t blocks = 0;
  auto flush = [&] {
    const int error = count ? launch(linear_int8_tile<T, Numbers>, dim3(blocks), dim3(kProductThreads),
                                     kStages * Shape<Four>::kStageBytes, stream, places)
                            : kSuccess;
    count = 0, blocks = 0;
    return error;
  };
  for (const Int8Product& p : products) {
    if (p.four != Four || !p.rows || !p.columns) continue;
    if (count == kMostProducts)
      if (const int error = flush()) return error;
    blocks += static_cast<uint32_t>(ceil_div(p.rows, 128) * ceil_div(p.columns, 128));
    places.product[count] = p;
    places.end[count] = blocks;
    places.wide[count] = p.columns % 4 == 0 && p.gate_stride % 4 == 0 && aligned16({p.out, p.residual, p.gate});
    ++count;
  }
  return flush();
}

}  // namespace gpu
}  // namespace qif
