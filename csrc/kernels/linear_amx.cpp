#include "kernels/linear_amx.h"

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "common/amx.h"

// A tile holds 16 rows of 64 bytes. Of `a`: 16 of its rows, 32 numbers of the depth. Of `b`: 16 pairs along the depth,
// 16 of its rows. Matrices are packed in tiles, filled up with zeros to whole pairs of tiles.
namespace qif {

namespace {

using namespace amx;

constexpr int64_t kRows = 16, kDepth = 32, kTile = 1024, kStep = 3 * kTile;
// A task is a block of results; it goes through the depth in chunks. What a chunk needs of both matrices lies in a
// core's second-level cache (2 MB).
constexpr int64_t kBlockRows = 256, kBlockColumns = 256, kBlockDepth = 512;
// Matrices are packed in pieces of at most this size: 14 MB of `a`, 9 MB of `b`.
constexpr int64_t kPieceRows = 1152, kPieceColumns = 768, kPieceDepth = 2048;

// The smallest multiple of 32 that cuts n into at most `blocks` blocks.
int64_t even_block(int64_t n, int64_t blocks) {
  return std::max<int64_t>(1, ceil_div(n, std::max<int64_t>(1, blocks) * 32)) * 32;
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The three parts of 32 numbers, as [first, second].
inline void split(__m512 first, __m512 second, __m512i parts[3]) {
  for (int p = 0; p < 3; p++) {
    parts[p] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    first = _mm512_sub_ps(first, widen(_mm512_castsi512_si256(parts[p])));
    second = _mm512_sub_ps(second, widen(_mm512_extracti64x4_epi64(parts[p], 1)));
  }
}

// The numbers [rows r0..r1][depth d0..d1] of a matrix, packed as [chunk of the depth][16 rows][32 of the depth][part].
struct Piece {
  const float* data;
  int64_t row, depth;  // strides
  bool pairs_in_rows;  // the layout of `b`
  int64_t r0, r1, d0, d1;
  char* packed;  // at first an offset, see Plan

  bool same(const Piece& o) const {
    return data == o.data && row == o.row && depth == o.depth && r0 == o.r0 && r1 == o.r1 && d0 == o.d0 && d1 == o.d1;
  }
  int64_t tiles() const { return 2 * ceil_div(r1 - r0, 32); }
  int64_t steps() const { return ceil_div(d1 - d0, kDepth); }
  int64_t bytes() const { return tiles() * steps() * kStep; }
  int64_t chunk_steps() const { return even_block(d1 - d0, ceil_div(d1 - d0, kBlockDepth)) / kDepth; }
  // Tile t of the chunk that begins at a step.
  char* tile(int64_t step, int64_t t) const {
    return packed + (step * tiles() + t * std::min(chunk_steps(), steps() - step)) * kStep;
  }
};

// Packs row t of tiles; returns the bits of its largest magnitude.
uint32_t pack(const Piece& x, int64_t t) {
  const int64_t r = x.r0 + t * kRows, count = std::min(kRows, x.r1 - r);
  const bool contiguous = x.depth == 1;
  const bool turn = contiguous == x.pairs_in_rows;
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(kInterleave), magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  alignas(64) char own[kStep];
  const int64_t chunk = x.chunk_steps();
  char* out = nullptr;
  for (int64_t step = 0; step < x.steps(); step++, out += kStep) {
    if (step % chunk == 0) out = x.tile(step, t);
    char* const tiles = turn ? own : out;
    const int64_t d = x.d0 + step * kDepth, left = x.d1 - d;
    for (int64_t i = 0; i < 16; i++) {
      __m512 first = _mm512_setzero_ps(), second = first;
      if (contiguous && i < count) {
        const float* from = x.data + (r + i) * x.row + d;
        first = _mm512_maskz_loadu_ps(first_lanes(left), from);
        second = _mm512_maskz_loadu_ps(first_lanes(left - 16), from + 16);
      } else if (!contiguous) {
        const float* from = x.data + (d + 2 * i) * x.depth + r;
        first = _mm512_maskz_loadu_ps(2 * i < left ? first_lanes(count) : 0, from);
        second = _mm512_maskz_loadu_ps(2 * i + 1 < left ? first_lanes(count) : 0, from + x.depth);
      }
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(first), magnitude));
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(second), magnitude));
      __m512i parts[3];
      split(first, second, parts);
      for (int p = 0; p < 3; p++)
        _mm512_store_si512(tiles + p * kTile + 64 * i,
                           contiguous ? parts[p] : _mm512_permutexvar_epi16(pairs, parts[p]));
    }
    if (turn)
      for (int p = 0; p < 3; p++) transpose(reinterpret_cast<const __m512i*>(own + p * kTile), out + p * kTile);
  }
  return _mm512_reduce_max_epu32(largest);
}

inline void load_a(const char* first, const char* second) {
  _tile_loadd(4, first, 64);
  _tile_loadd(5, second, 64);
}

inline void load_b(const char* first, const char* second) {
  _tile_loadd(6, first, 64);
  _tile_loadd(7, second, 64);
}

inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sums[32][32] = the products of two tiles of `a` with two of `b` over `steps` of the depth.
inline void multiply(const char* a0, const char* a1, const char* b0, const char* b1, int64_t steps, float* sums) {
  constexpr int64_t h = 0, m = kTile, l = 2 * kTile, stride = 32 * sizeof(float);
  tile_barrier();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps * kStep; s += kStep) {
    load_a(a0 + s + l, a1 + s + l);
    load_b(b0 + s + h, b1 + s + h);
    add_products();
    load_a(a0 + s + m, a1 + s + m);
    add_products();
    load_b(b0 + s + m, b1 + s + m);
    add_products();
    load_a(a0 + s + h, a1 + s + h);
    add_products();
    load_b(b0 + s + l, b1 + s + l);
    add_products();
    load_b(b0 + s + h, b1 + s + h);
    add_products();
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  _tile_stored(2, sums + 16 * 32, stride);
  _tile_stored(3, sums + 16 * 32 + 16, stride);
  tile_barrier();
}

// out = sums (+ out) + bias for 32 x 32 sums, of which `rows` and `columns` are there.
inline void store(const float* sums, float* out, int64_t stride, int64_t rows, int64_t columns, bool add,
                  const float* bias) {
  for (int half = 0; half < 2; half++, sums += 16, out += 16, columns -= 16, bias += bias ? 16 : 0) {
    const __mmask16 there = first_lanes(columns);
    if (!there) return;
    const __mmask16 before = add ? there : 0;
    const __m512 last = bias ? _mm512_maskz_loadu_ps(there, bias) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r++) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + 32 * r), _mm512_maskz_loadu_ps(before, out + r * stride));
      _mm512_mask_storeu_ps(out + r * stride, there, _mm512_add_ps(sum, last));
    }
  }
}

// Neither infinite as bfloat16, nor so small together that parts of the products are flushed to zero.
bool in_range(uint32_t a, uint32_t b) {
  constexpr uint32_t kInfinite = 0x7f7f8000;
  if (a >= kInfinite || b >= kInfinite) return false;
  const int exponents = static_cast<int>(a >> 23) + static_cast<int>(b >> 23) - 2 * 127;
  return a == 0 || b == 0 || ((a >> 23) > 32 && (b >> 23) > 32 && exponents > -80);
}

}  // namespace

bool amx_available() {
  static const bool available = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vl")) return false;
    unsigned eax = 7, ebx, ecx = 0, edx;
    asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    if (!(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return available;
}

namespace {

// A block of the product of two pieces; rows and columns in pairs of tiles.
struct Task {
  size_t product, a, b;
  int64_t row, rows, column, columns;
};

// Row t of the tiles of a piece, to be packed.
struct TileRow {
  size_t piece;
  int64_t t;
  uint32_t largest = 0;
};

// What is done between two barriers: pieces are packed, then blocks are multiplied.
struct Stage {
  std::vector<TileRow> rows;
  std::vector<Task> tasks;
};

// The order of the work. A piece that several products need is packed once while there is room for it.
class Plan {
 public:
  Plan(const AmxProduct* products, int64_t count, int threads) : stages(1) {
    for (int64_t i = 0; i < count; i++) {
      const AmxProduct& p = products[i];
      for (int64_t d = 0; d < p.depth; d += kPieceDepth) {
        if (d > 0) stages.emplace_back();  // adds to what the stage before wrote
        const int64_t d1 = std::min(p.depth, d + kPieceDepth);
        for (int64_t r = 0; r < p.rows; r += kPieceRows)
          for (int64_t c = 0; c < p.columns; c += kPieceColumns) {
            const Piece a{p.a, p.a_row, p.a_depth, false, r, std::min(p.rows, r + kPieceRows), d, d1, nullptr};
            const Piece b{p.b, p.b_row, p.b_depth, true, c, std::min(p.columns, c + kPieceColumns), d, d1, nullptr};
            const size_t piece_a = a_.get(*this, a), piece_b = b_.get(*this, b);
            cut(i, piece_a, piece_b, ceil_div(2 * threads, count));
          }
      }
    }
    bytes = a_.most + b_.most;
  }

  void place(char* memory) {
    for (const size_t i : a_.all) pieces[i].packed += reinterpret_cast<uintptr_t>(memory);
    for (const size_t i : b_.all) pieces[i].packed += reinterpret_cast<uintptr_t>(memory) + a_.most;
  }

  std::vector<Piece> pieces;
  std::vector<Stage> stages;
  int64_t bytes;

 private:
  // The memory for pieces of one of the two layouts.
  struct Room {
    const int64_t size;
    int64_t used = 0, most = 0;
    std::vector<size_t> held, all;

    size_t get(Plan& plan, Piece piece) {
      for (const size_t i : held)
        if (plan.pieces[i].same(piece)) return i;
      if (used + piece.bytes() > size) {
        plan.stages.emplace_back();
        held.clear();
        used = 0;
      }
      piece.packed += used;
      used += piece.bytes();
      most = std::max(most, used);
      const size_t i = plan.pieces.size();
      plan.pieces.push_back(piece);
      held.push_back(i);
      all.push_back(i);
      for (int64_t t = 0; t < piece.tiles(); t++) plan.stages.back().rows.push_back({i, t});
      return i;
    }
  };

  void cut(size_t product, size_t a, size_t b, int64_t tasks) {
    const int64_t rows = pieces[a].r1 - pieces[a].r0, columns = pieces[b].r1 - pieces[b].r0;
    const int64_t block_c = even_block(columns, ceil_div(columns, kBlockColumns)) / 32;
    const int64_t pairs_a = ceil_div(rows, 32), pairs_b = ceil_div(columns, 32);
    const int64_t enough = ceil_div(tasks, ceil_div(pairs_b, block_c));
    const int64_t block_r = even_block(rows, std::max(enough, ceil_div(rows, kBlockRows))) / 32;
    for (int64_t c = 0; c < pairs_b; c += block_c)
      for (int64_t r = 0; r < pairs_a; r += block_r)
        stages.back().tasks.push_back(
            {product, a, b, r, std::min(block_r, pairs_a - r), c, std::min(block_c, pairs_b - c)});
  }

  Room a_{kPieceRows * kPieceDepth * 6}, b_{kPieceColumns * kPieceDepth * 6};
};

void run(const AmxProduct& p, const Task& task, const Piece& a, const Piece& b, float* sums) {
  const int64_t chunk = a.chunk_steps();
  for (int64_t step = 0; step < a.steps(); step += chunk) {
    const int64_t steps = std::min(chunk, a.steps() - step), tile = steps * kStep;
    const bool add = a.d0 > 0 || step > 0, last = a.d1 == p.depth && step + chunk >= a.steps();
    for (int64_t j = task.column; j < task.column + task.columns; j++)
      for (int64_t k = task.row; k < task.row + task.rows; k++) {
        const char *const tile_a = a.tile(step, 2 * k), *const tile_b = b.tile(step, 2 * j);
        const int64_t r = a.r0 + 32 * k, c = b.r0 + 32 * j;
        for (int64_t i = 0, n = std::min<int64_t>(32, p.rows - r); i < n; i++) {
          __builtin_prefetch(p.out + (r + i) * p.columns + c, 1, 2);
          __builtin_prefetch(p.out + (r + i) * p.columns + std::min(c + 16, p.columns - 1), 1, 2);
        }
        multiply(tile_a, tile_a + tile, tile_b, tile_b + tile, steps, sums);
        store(sums, p.out + r * p.columns + c, p.columns, std::min<int64_t>(32, p.rows - r), p.columns - c, add,
              p.bias && last ? p.bias + c : nullptr);
      }
  }
}

}  // namespace

bool amx_products(const AmxProduct* products, int64_t count) {
  const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  Plan plan(products, count, threads);
  plan.place(scratch<Plan>(plan.bytes));

#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
    (void)tiles;
    alignas(64) float sums[32 * 32];
    for (Stage& stage : plan.stages) {
#pragma omp for schedule(dynamic, 2)
      for (size_t i = 0; i < stage.rows.size(); i++)
        stage.rows[i].largest = pack(plan.pieces[stage.rows[i].piece], stage.rows[i].t);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < stage.tasks.size(); i++) {
        const Task& task = stage.tasks[i];
        run(products[task.product], task, plan.pieces[task.a], plan.pieces[task.b], sums);
      }
    }
  }

  std::vector<uint32_t> largest(plan.pieces.size());
  for (const Stage& stage : plan.stages)
    for (const TileRow& row : stage.rows) largest[row.piece] = std::max(largest[row.piece], row.largest);
  std::vector<uint32_t> a(count), b(count);
  for (const Stage& stage : plan.stages)
    for (const Task& task : stage.tasks) {
      a[task.product] = std::max(a[task.product], largest[task.a]);
      b[task.product] = std::max(b[task.product], largest[task.b]);
    }
  for (int64_t i = 0; i < count; i++)
    if (!in_range(a[i], b[i])) return false;
  return true;
}

}  // namespace qif
