// Compiled once for each unit that multiplies, with its instructions and QIF_ISA as its namespace (cmake/int8.cmake).
#include <omp.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(QIF_X86)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__)
#include "common/amx.h"
#endif

#include "common/segments.h"
#include "common/vec.h"
#include "kernels/int4_tile.h"
#include "kernels/linear_int8.h"

namespace qif {
namespace QIF_ISA {

constexpr int64_t kBlock = 32;                     // rows and columns of sums that are made together
constexpr int64_t kTile = kInt8Rows * kInt8Depth;  // bytes; as many in 64 numbers of 16 columns
// A task: up to kMostTaskRows rows with kMostTaskColumns columns, kDeep steps of the depth at a time. Its part of the
// rows and its sums lie in the second-level cache, the columns come by once, the next ones fetched ahead.
constexpr int64_t kDeep = 16, kMostTaskRows = 352, kMostTaskColumns = 512;
constexpr int64_t kSerial = int64_t{1} << 22;  // multiplications that are not worth a second thread

typedef int32_t I32 __attribute__((vector_size(kVecBytes)));

// ---- sums[32][32] (+)= rows times columns, over `steps` tiles of the depth
// --------------------------------------------
//
// a: two tiles of 16 rows, `a_stride` bytes apart, of which `rows` are wanted; b: likewise two panels of 16 columns.
// `between` is called once for every step: other work, which the tile unit does not wait for.

// Steps after which sums are put away, so that the columns' part of the weight stays in the first-level cache.
constexpr int64_t kChunk = 8;

#if defined(__AMX_INT8__)

struct Unit : amx::Tiles {
  template <class F>
  static void multiply(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* b, int64_t b_stride,
                       int64_t steps, int32_t* sums, bool add, F&& between) {
    constexpr int64_t stride = kBlock * sizeof(int32_t);
    const bool both = rows > kInt8Rows;
    amx::tile_barrier();
    if (add) {
      _tile_loadd(0, sums, stride);
      _tile_loadd(1, sums + 16, stride);
      _tile_loadd(2, sums + 16 * kBlock, stride);
      _tile_loadd(3, sums + 16 * kBlock + 16, stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const uint8_t *a0 = a, *a1 = a + a_stride;
    const int8_t *b0 = b, *b1 = b + b_stride;
    if (both) {
      for (int64_t s = 0; s < steps * kTile; s += kTile) {
        between();
        _tile_loadd(4, a0 + s, 64);
        _tile_loadd(6, b0 + s, 64);
        _tile_loadd(7, b1 + s, 64);
        _tile_loadd(5, a1 + s, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
    } else {
      for (int64_t s = 0; s < steps * kTile; s += kTile) {
        between();
        _tile_loadd(4, a0 + s, 64);
        _tile_loadd(6, b0 + s, 64);
        _tile_loadd(7, b1 + s, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
      }
    }
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + 16, stride);
    if (both) {
      _tile_stored(2, sums + 16 * kBlock, stride);
      _tile_stored(3, sums + 16 * kBlock + 16, stride);
    }
    amx::tile_barrier();
  }
};

#else

// The instruction adds to one of its operands. Of the compiler's functions for it GCC 12 makes two moves besides, and
// spills: a quarter of the time, so it is written as assembly.
#if defined(__AVX512VNNI__)

constexpr int kMostRows = 8, kWide = 16;
using Sums = __m512i;
inline Sums zero_sums() { return _mm512_setzero_si512(); }
inline Sums load_sums(const void* p) { return _mm512_loadu_si512(p); }
inline void store_sums(void* p, Sums v) { _mm512_storeu_si512(p, v); }
inline Sums four_values(int32_t four) { return _mm512_set1_epi32(four); }
struct Columns {
  Sums weights;
  explicit Columns(const void* p) : weights(load_sums(p)) {}
  Sums add(Sums sums, Sums values) const {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(weights));
    return sums;
  }
};

#elif defined(__AVX2__)

constexpr int kWide = 8;
using Sums = __m256i;
inline Sums zero_sums() { return _mm256_setzero_si256(); }
inline Sums load_sums(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_sums(void* p, Sums v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
#if defined(__AVXVNNI__)
constexpr int kMostRows = 6;
inline Sums four_values(int32_t four) { return _mm256_set1_epi32(four); }
struct Columns {
  Sums weights;
  explicit Columns(const void* p) : weights(load_sums(p)) {}
  Sums add(Sums sums, Sums values) const {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(values), "x"(weights));
    return sums;
  }
};
#else
// The instruction adds two products of unsigned and signed numbers in 16 bits, where 255 * 127 twice saturates but
// 127 * 128 twice does not: values lose their 128, and signs of weights go to the values.
constexpr int kMostRows = 4;
inline Sums four_values(int32_t four) { return _mm256_set1_epi32(four ^ static_cast<int32_t>(0x80808080u)); }
struct Columns {
  Sums weights, magnitudes;
  explicit Columns(const void* p) : weights(load_sums(p)), magnitudes(_mm256_abs_epi8(weights)) {}
  Sums add(Sums sums, Sums values) const {
    const Sums pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(values, weights));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#endif

#endif

#if defined(__AVX2__)

// kRows rows of one tile of rows with two vectors of columns, `b_stride` bytes apart.
template <int kRows>
inline void multiply_rows(const uint8_t* a, const int8_t* b, int64_t b_stride, int64_t steps, int32_t* sums, bool add) {
  Sums sum[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < 2; ++c) sum[r][c] = add ? load_sums(sums + r * kBlock + c * kWide) : zero_sums();
  for (int64_t s = 0; s < steps; ++s, a += kTile, b += kTile) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(a + 2 * kTile + r * kInt8Depth);
    for (int64_t q = 0; q < kInt8Depth; q += 4) {
      const Columns b0(b + q * kInt8Columns), b1(b + q * kInt8Columns + b_stride);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, a + r * kInt8Depth + q, 4);
        const Sums values = four_values(four);
        sum[r][0] = b0.add(sum[r][0], values);
        sum[r][1] = b1.add(sum[r][1], values);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < 2; ++c) store_sums(sums + r * kBlock + c * kWide, sum[r][c]);
}

template <int kRows = kMostRows>
inline void multiply_rows_of(int64_t rows, const uint8_t* a, const int8_t* b, int64_t b_stride, int64_t steps,
                             int32_t* sums, bool add) {
  if constexpr (kRows == 1) {
    multiply_rows<1>(a, b, b_stride, steps, sums, add);
  } else if (rows >= kRows) {
    multiply_rows<kRows>(a, b, b_stride, steps, sums, add);
  } else {
    multiply_rows_of<kRows - 1>(rows, a, b, b_stride, steps, sums, add);
  }
}

#endif

struct Unit {
  template <class F>
  static void multiply(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* b, int64_t b_stride,
                       int64_t steps, int32_t* sums, bool add, F&& between) {
    for (int64_t s = 0; s < steps; ++s) between();
    for (int64_t t = 0; t < rows; t += kInt8Rows, a += a_stride, sums += kInt8Rows * kBlock) {
      const int64_t count = std::min(kInt8Rows, rows - t);
#if defined(__AVX2__)
      for (int64_t r = 0, parts = (count + kMostRows - 1) / kMostRows, part = 0; part < parts; ++part) {
        const int64_t end = count * (part + 1) / parts;
        if constexpr (kWide == kInt8Columns) {
          multiply_rows_of(end - r, a + r * kInt8Depth, b, b_stride, steps, sums + r * kBlock, add);
        } else {
          for (int64_t c = 0; c < 2; ++c)
            multiply_rows_of(end - r, a + r * kInt8Depth, b + c * b_stride, 4 * kWide, steps,
                             sums + r * kBlock + c * kInt8Columns, add);
        }
        r = end;
      }
#else
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < kBlock; ++c) {
          int32_t sum = add ? sums[r * kBlock + c] : 0;
          const int8_t* column = b + c / kInt8Columns * b_stride + c % kInt8Columns * 4;
          for (int64_t s = 0; s < steps; ++s)
            for (int64_t d = 0; d < kInt8Depth; ++d)
              sum += a[s * kTile + r * kInt8Depth + d] * column[s * kTile + d / 4 * 4 * kInt8Columns + d % 4];
          sums[r * kBlock + c] = sum;
        }
#endif
    }
  }
};

#endif

#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
constexpr int32_t kOffset = 0;
#else
constexpr int32_t kOffset = 128;
#endif

// ---- what follows the sums
// --------------------------------------------------------------------------------------------

inline float to_float(int32_t x, float) { return static_cast<float>(x); }
inline Vec<float> to_float(I32 x, Vec<float>) { return __builtin_convertvector(x, Vec<float>); }
template <class V>
struct IntegersOf {
  using type = I32;
};
template <>
struct IntegersOf<float> {
  using type = int32_t;
};

// What a block's columns have in common.
struct alignas(64) ColumnValues {
  float scales[kBlock], bias[kBlock];
  int32_t offsets[kBlock];
};

template <class T>
inline void column_values(const Int8Product& p, int64_t c, int64_t columns, ColumnValues& v) {
  for (int64_t j = 0; j < columns; ++j) {
    v.scales[j] = p.weight_scales[c + j];
    v.bias[j] = p.bias ? widen(static_cast<const T*>(p.bias)[c + j]) : 0.0f;
    v.offsets[j] = p.sums[c + j] * kOffset;
  }
}

// out = y, or residual + gate * y, of one row; kGated says which.
template <bool kGated, class T>
inline void finish_row(const int32_t* sums, const ColumnValues& v, float scale, const T* residual, const T* gate,
                       T* out, int64_t columns) {
  each<float>(columns, [&](auto lane, int64_t j) {
    using V = typename decltype(lane)::type;
    using I = typename IntegersOf<V>::type;
    I sum, offset;
    std::memcpy(&sum, sums + j, sizeof(sum));
    std::memcpy(&offset, v.offsets + j, sizeof(offset));
    V y = to_float(sum - offset, V{}) * (load<V>(v.scales + j) * scale) + load<V>(v.bias + j);
    if constexpr (kGated) {
      y = load<V>(residual + j) + load<V>(gate + j) * y;
      if constexpr (std::is_same_v<T, Half>) {
        const V top = splat<V>(65504.0f);
        y = y > top ? top : y;
        y = y < -top ? -top : y;
      }
    }
    store(out + j, y);
  });
}

// Rows r.. and columns c.. of the result from their sums.
template <class T>
inline void finish(const Int8Product& p, const ColumnValues& v, const int32_t* sums, int64_t r, int64_t rows, int64_t c,
                   int64_t columns) {
  T* out = static_cast<T*>(p.out) + r * p.columns + c;
  const float* scales = p.scales + r;
  if (!p.residual) {
    const T* none = nullptr;
    for (int64_t i = 0; i < rows; ++i, sums += kBlock, out += p.columns) {
      if (columns == kBlock)
        finish_row<false, T>(sums, v, scales[i], none, none, out, kBlock);
      else
        finish_row<false, T>(sums, v, scales[i], none, none, out, columns);
    }
    return;
  }
  const Segments segments{p.offsets, p.rows, p.segments};
  const T *residual = static_cast<const T*>(p.residual) + r * p.columns + c, *gate = nullptr;
  for (int64_t i = 0, end = 0; i < rows; ++i, sums += kBlock, out += p.columns, residual += p.columns) {
    if (r + i >= end) {
      const int64_t s = segments.find(r + i);
      end = segments.end(s);
      gate = static_cast<const T*>(p.gate) + s * p.gate_stride + c;
    }
    if (columns == kBlock)
      finish_row<true, T>(sums, v, scales[i], residual, gate, out, kBlock);
    else
      finish_row<true, T>(sums, v, scales[i], residual, gate, out, columns);
  }
}

// ---- the order of the work
// --------------------------------------------------------------------------------------------

struct alignas(64) Unpacked {
  int8_t data[2 * kDeep * kTile];
};

struct Task {
  const Int8Product* product;
  int64_t row, rows, column, columns;
};

// Rows of a block that are to be finished.
struct Rest {
  const int32_t* sums;
  int64_t row, rows;
};

template <class T>
inline void fetch(const T* row, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(row + i * stride, 0, 2);
}

// Two panels of columns from 4 bits, `steps` tiles of the depth of each, `stride` bytes apart.
inline void unpack(const uint8_t* from, int64_t panel, bool both, int64_t steps, int8_t* out, int64_t stride) {
  for (int64_t s = 0; s < steps; ++s) {
    int4_unpack(from + s * kInt4Tile, out + s * kTile);
    if (both) int4_unpack(from + panel + s * kInt4Tile, out + stride + s * kTile);
  }
}

template <class T>
static void run(const Task& task, int32_t* sums, int8_t* unpacked) {
  const Int8Product& p = *task.product;
  const int64_t steps = (p.depth + kInt8Depth - 1) / kInt8Depth, panel = steps * kTile;
  const int64_t height = (task.rows + kBlock - 1) / kBlock * kBlock;
  for (int64_t deep = 0; deep < steps; deep += kDeep)
    for (int64_t j = 0; j < task.columns; j += kBlock) {
      const int64_t column = task.column + j, columns = std::min(kBlock, task.columns - j);
      const bool two = columns > kInt8Columns;
      const int64_t end = std::min(deep + kDeep, steps);
      // In 4 bits, a panel is shorter, and multiplied is what was made of it.
      const int64_t tile = p.four ? kInt4Tile : kTile, stored = steps * tile;
      const int8_t* source = p.weight + column / kInt8Columns * stored;
      const int8_t* b = p.four ? unpacked - deep * kTile : source;
      const int64_t b_stride = !two ? 0 : p.four ? kDeep * kTile : panel;
      if (p.four)
        unpack(reinterpret_cast<const uint8_t*>(source) + deep * tile, stored, two, end - deep, unpacked, b_stride);
      ColumnValues v;
      if (end == steps) column_values<T>(p, column, columns, v);
      for (int64_t s = deep; s < end; s += kChunk) {
        const int64_t count = std::min(kChunk, end - s);
        const bool last = s + count == steps;
        // What the two panels of columns that come next begin with is fetched in the meantime, a share at every step.
        const int8_t* next = source + (s + count) * tile;
        if (s + count == end || p.four) {
          const bool beside = j + kBlock < task.columns || end == steps;
          next = beside ? source + 2 * stored + (end == steps ? 0 : deep) * tile
                        : p.weight + task.column / kInt8Columns * stored + end * tile;
          if (p.four) next += (s - deep) * tile;
        }
        const int64_t lines = (tile / 64 * kBlock + height - 1) / height;
        Rest rest = {nullptr, 0, 0};
        for (int64_t r = 0; r < task.rows; r += kBlock) {
          const int64_t rows = std::min(kBlock, task.rows - r);
          int32_t* block = sums + j * height + r * kBlock;
          const uint8_t* a = p.values + (task.row + r) / kInt8Rows * panel + s * kTile;
          if (last) {
            fetch(static_cast<T*>(p.out) + (task.row + r) * p.columns + column, rows, p.columns);
            if (p.residual)
              fetch(static_cast<const T*>(p.residual) + (task.row + r) * p.columns + column, rows, p.columns);
          }
          // The block before is finished while the tile unit multiplies.
          const auto finish_some = [&](int64_t most) {
            const int64_t now = std::min(most, rest.rows);
            if (now > 0) finish<T>(p, v, rest.sums, rest.row, now, column, columns);
            rest = {rest.sums + now * kBlock, rest.row + now, rest.rows - now};
          };
          Unit::multiply(a, panel, rows, b + s * kTile, b_stride, count, block, s > 0, [&] {
            for (int64_t i = 0; i < lines; ++i, next += 64) {
              __builtin_prefetch(next, 0, 2);
              __builtin_prefetch(next + stored, 0, 2);
            }
            finish_some(kBlock / kChunk);
          });
          finish_some(kBlock);
          if (last) rest = {block, task.row + r, rows};
        }
        if (rest.rows) finish<T>(p, v, rest.sums, rest.row, rest.rows, column, columns);
      }
    }
}

static void run_any(const Task& task, int32_t* sums, int8_t* unpacked) {
  switch (task.product->dtype) {
    case kFloat16:
      return run<Half>(task, sums, unpacked);
    case kBFloat16:
      return run<BFloat16>(task, sums, unpacked);
    default:
      return run<float>(task, sums, unpacked);
  }
}

// n cut into equal parts of at most `most`, in whole blocks.
inline int64_t even(int64_t n, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (n + most - 1) / most);
  return std::max<int64_t>(1, ((n + parts - 1) / parts + kBlock - 1) / kBlock) * kBlock;
}

void linear_int8(const Int8Product* products, int64_t count) {
  int64_t work = 0, places = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Int8Product& p = products[i];
    work += p.rows * p.columns * p.depth;
    places += (p.rows + kMostTaskRows - 1) / kMostTaskRows * p.columns;
  }
  const int threads = work < kSerial || omp_in_parallel() ? 1 : omp_get_max_threads();
  // Four tasks for a thread, or more: none waits for long at the end.
  const int64_t wide = std::min(kMostTaskColumns, std::max(kBlock, places / (4 * threads) / kBlock * kBlock));
  std::vector<Task> tasks;
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Int8Product& p = products[i];
    const int64_t rows = even(p.rows, kMostTaskRows), columns = even(p.columns, threads == 1 ? kMostTaskColumns : wide);
    most = std::max(most, rows * columns);
    for (int64_t r = 0; r < p.rows; r += rows)
      for (int64_t c = 0; c < p.columns; c += columns)
        tasks.push_back({&p, r, std::min(rows, p.rows - r), c, std::min(columns, p.columns - c)});
  }
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const Unit unit;
    const std::unique_ptr<int32_t[]> memory(new int32_t[most + 16]);
    int32_t* sums = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / 4;
    Unpacked unpacked;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i) run_any(tasks[i], sums, unpacked.data);
  }
}

}  // namespace QIF_ISA
}  // namespace qif
