#include "kernels/joint_attention_amx.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "kernels/joint_attention_tiles.h"

namespace qif {

namespace {

using namespace amx;

constexpr int64_t kKeys = 512;  // whose weights of 32 rows are held at once
constexpr int64_t kRows = 128;  // of a task
constexpr int64_t kMostDim = 128;
constexpr int64_t kGroup = 4;                   // rows whose weights are computed together
constexpr int64_t kRing = 4;                    // blocks of scores whose weights are not computed yet
constexpr int64_t kPacked = int64_t{24} << 20;  // bytes of keys and values
// Scores in powers of two are at most kLargest in magnitude, or others compute. Above kShifted they are made smaller by
// the difference: no weight is larger than 2^kShifted, which leaves room for sums, and the largest of a row is not
// smaller than 2^(kShifted - 2 kLargest), which is 2^26 times the smallest number that bfloat16 holds in full.
constexpr float kLargest = 80, kShifted = 60;

// The larger one; not a number where one is none.
float largest(float a, float b) { return a <= b || b != b ? b : a; }

// The largest |row|^2 of rows [first, first + 32); not a number where one is none.
float largest_square(const Matrix& m, int64_t first) {
  float most = 0;
  for (int64_t r = first; r < std::min(first + kBlock, m.rows); ++r) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < m.dim; d += 32) {
      const __m512bh x = reinterpret_cast<__m512bh>(m.part(r, d));
      sum = _mm512_dpbf16_ps(sum, x, x);
    }
    most = largest(most, _mm512_reduce_add_ps(sum));
  }
  return most;
}

// ---- one task: some rows of one head ----

struct alignas(64) Memory {
  Bits q[kRows * kMostDim], weights[2][kBlock * kKeys];
  float scores[kRing][kBlock * kBlock], sums[kRows * kMostDim];
  __m512 totals[kRows];  // of weights
};

// An item is 32 rows with 256 keys. Its scores are made a block of 32 keys after the other; their weights follow, and
// when those of the item are complete, the sums of values. All this is one stream: while the unit multiplies, for
// scores of this item and values of the one before, the vectors turn those scores into weights that are there.
struct Task {
  const Bits *keys, *values;  // packed
  int64_t panel;              // of the values
  int64_t count;              // of keys
  int64_t dim, rows;
  float scale, away;
  Memory& memory;

  int64_t parts() const { return ceil_div(rows, kBlock); }
  int64_t items() const { return parts() * ceil_div(count, kKeys); }
  int64_t first_key(int64_t item) const { return item / parts() * kKeys; }
  int64_t blocks_of(int64_t item) const { return ceil_div(std::min(kKeys, count - first_key(item)), kBlock); }

  // Where the vectors are: at some rows of a block of an item. All but the row changes with the block.
  struct Place {
    int64_t item = 0, block = 0, row = 0;
    int64_t before = 0;  // blocks
    int64_t left;        // keys from this block on
    bool last;           // block of the item
    const float* scores;
    Bits* weights;
    __m512* totals;
  };

  void find(Place& at) const {
    at.left = count - first_key(at.item) - at.block * kBlock;
    at.last = at.block + 1 == blocks_of(at.item);
    at.scores = memory.scores[at.before % kRing];
    at.weights = memory.weights[at.item % 2] + at.block * kTile;
    at.totals = memory.totals + at.item % parts() * kBlock;
  }

  template <class F>
  void score(int64_t item, int64_t block, float* scores, F&& between) const {
    const Bits* q = memory.q + item % parts() * kBlock * dim;
    const Bits* k = keys + (first_key(item) + block * kBlock) * dim;
    multiply(q, 16 * dim, k, 16 * dim, dim / 32, scores, kBlock, false, between);
  }

  template <class F>
  void add_values(int64_t item, int64_t d, F&& between) const {
    const int64_t first = first_key(item);
    float* sums = memory.sums + item % parts() * kBlock * dim + d;
    const Bits* v = values + d / 16 * panel + first / 32 * kTile;
    multiply(memory.weights[item % 2], kKeys / 32 * kTile, v, panel, blocks_of(item), sums, dim, first > 0, between);
  }

  // 2^(score * scale + away) of kGroup rows of a block, as rows of a left tile; those of keys that are none are 0.
  template <bool kAll>
  void weigh(const Place& at) const {
    const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(away);
    const float* scores = at.scores + at.row * kBlock;
    Bits* weights = at.weights + at.row / 16 * (kKeys / 32 * kTile) + at.row % 16 * 32;
#pragma GCC unroll 4
    for (int64_t r = 0; r < kGroup; ++r) {
      __m512 x = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + r * kBlock), factor, shift));
      __m512 y = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + r * kBlock + 16), factor, shift));
      if (!kAll) {
        x = _mm512_maskz_mov_ps(first_lanes(at.left), x);
        y = _mm512_maskz_mov_ps(first_lanes(at.left - 16), y);
      }
      const __m512bh w = _mm512_cvtne2ps_pbh(y, x);
      _mm512_store_si512(weights + 32 * r, reinterpret_cast<__m512i>(w));
    }
  }

  // Adds the weights of kGroup rows of an item, as they were rounded, to their totals.
  void add_weights(const Place& at) const {
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    const Bits* weights = at.weights + at.row / 16 * (kKeys / 32 * kTile) + at.row % 16 * 32;
    for (int64_t r = 0; r < kGroup; ++r) {
      __m512 total = at.totals[at.row + r];
      for (int64_t block = 0; block <= at.block; ++block) {
        const void* w = weights - block * kTile + 32 * r;
        total = _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(_mm512_load_si512(w)), ones);
      }
      at.totals[at.row + r] = total;
    }
  }

  void run() const {
    std::fill(memory.totals, memory.totals + parts() * kBlock, _mm512_setzero_ps());
    const int64_t pace = ceil_div(16 / kGroup, dim / 32);  // groups a step, of which the unit takes dim / 16 a block
    int64_t scored = 0;                                    // blocks
    Place at;
    find(at);
    const auto advance = [&] {
      at.left < kBlock ? weigh<false>(at) : weigh<true>(at);
      if (at.last) add_weights(at);
      if ((at.row += kGroup) == kBlock) {
        at.row = 0, ++at.before;
        ++at.block;
        if (at.last) at.block = 0, ++at.item;
        find(at);
      }
    };
    const auto between = [&] {
      for (int64_t i = 0; i < pace && at.before < scored; ++i) advance();
    };
    for (int64_t item = 0; item <= items(); ++item) {
      int64_t d = 0;
      const auto add_values_to = [&](int64_t end) {
        if (item == 0 || d >= end) return;
        while (at.item < item) advance();
        for (; d < end; d += kBlock) add_values(item - 1, d, between);
      };
      for (int64_t block = 0; item < items() && block < blocks_of(item); ++block) {
        while (at.before + kRing <= scored) advance();
        score(item, block, memory.scores[scored % kRing], between);
        ++scored;
        add_values_to((block + 1) * dim / blocks_of(item) / kBlock * kBlock);
      }
      add_values_to(dim);
    }
  }
};

// Of some heads of a sample: packed keys and values, and the largest |key|^2 of each block.
struct Packed {
  Bits *keys, *values;
  float* squares;
  int64_t blocks, panel, head;  // of 32 keys; numbers of 16 columns of the values, and of a head
};

// Rows [first, first + rows) of a head; false: scores may be too large.
bool attend(const Matrix& q, const Packed& packed, int64_t head, int64_t count, Memory& memory, Bits* out,
            int64_t out_stride, float* lse) {
  float rows_square = 0, keys_square = 0;
  for (int64_t r = 0; r < q.rows; r += kBlock) {
    pack_rows(q, r, memory.q + r * q.dim);
    rows_square = largest(rows_square, largest_square(q, r));
  }
  for (int64_t i = 0; i < packed.blocks; ++i)
    keys_square = largest(keys_square, packed.squares[head * packed.blocks + i]);
  const float scale = kLog2E / std::sqrt(static_cast<float>(q.dim));
  const float bound = scale * std::sqrt(rows_square) * std::sqrt(keys_square);
  if (!(bound <= kLargest)) return false;
  const float away = std::min(0.0f, kShifted - bound);
  Task{packed.keys + head * packed.head,
       packed.values + head * packed.head,
       packed.panel,
       count,
       q.dim,
       q.rows,
       scale,
       away,
       memory}
      .run();
  for (int64_t r = 0; r < q.rows; ++r) {
    const float sum = _mm512_reduce_add_ps(memory.totals[r]);
    const __m512 share = _mm512_set1_ps(1 / sum);
    for (int64_t d = 0; d < q.dim; d += 32) {
      const float* sums = memory.sums + r * q.dim + d;
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(sums), share);
      const __m512 y = _mm512_mul_ps(_mm512_load_ps(sums + 16), share);
      _mm512_storeu_si512(out + r * out_stride + d, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x)));
    }
    lse[r] = (std::log2(sum) - away) / kLog2E;
  }
  return true;
}

}  // namespace

std::vector<int64_t> joint_attention_amx(const AmxAttention& p) {
  const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int64_t dim = p.head_dim, width = p.heads * dim;
  const Bits *q = static_cast<const Bits*>(p.q), *k = static_cast<const Bits*>(p.k), *v = static_cast<const Bits*>(p.v);
  int64_t total = 0, q0 = 0, k0 = 0;
  for (const int64_t n : p.q_lens) total += n;
  std::vector<int64_t> left_out;
  for (size_t sample = 0; sample < p.q_lens.size(); q0 += p.q_lens[sample], k0 += p.k_lens[sample], ++sample) {
    const int64_t rows = p.q_lens[sample], count = p.k_lens[sample], parts = ceil_div(rows, kRows);
    Packed packed;
    packed.blocks = ceil_div(count, kBlock), packed.panel = packed.blocks * kTile,
    packed.head = packed.panel * dim / 16;
    const int64_t group = std::clamp<int64_t>(kPacked / (4 * packed.head), 1, p.heads);
    bool good = true;
    for (int64_t h0 = 0; h0 < p.heads && rows > 0 && good; h0 += group) {
      const int64_t heads = std::min(group, p.heads - h0);
      char* const memory = scratch<Packed>(heads * (packed.head * 4 + packed.blocks * 4));
      packed.keys = reinterpret_cast<Bits*>(memory), packed.values = packed.keys + heads * packed.head;
      packed.squares = reinterpret_cast<float*>(packed.values + heads * packed.head);
#pragma omp parallel num_threads(threads)
      {
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < heads * packed.blocks; ++i) {
          const int64_t h = i / packed.blocks, block = i % packed.blocks, at = (h0 + h) * dim;
          const Matrix keys{k + k0 * p.k_stride + at, count, dim, p.k_stride};
          const Matrix values{v + k0 * p.v_stride + at, count, dim, p.v_stride};
          pack_keys(keys, block * kBlock, packed.keys + h * packed.head + block * kBlock * dim);
          pack_values(values, block * kBlock, packed.values + h * packed.head + block * kTile, packed.panel);
          packed.squares[i] = largest_square(keys, block * kBlock);
        }
        const Tiles tiles;
        (void)tiles;
        Memory& own = *reinterpret_cast<Memory*>(scratch<Memory>(sizeof(Memory)));
#pragma omp for schedule(dynamic) reduction(&& : good)
        for (int64_t i = 0; i < heads * parts; ++i) {
          const int64_t h = i / parts, first = q0 + i % parts * kRows, at = (h0 + h) * dim;
          const Matrix source{q + first * p.q_stride + at, std::min(kRows, q0 + rows - first), dim, p.q_stride};
          Bits* const out = static_cast<Bits*>(p.out) + first * width + at;
          good = attend(source, packed, h, count, own, out, width, p.lse + (h0 + h) * total + first) && good;
        }
      }
    }
    if (!good) left_out.push_back(static_cast<int64_t>(sample));
  }
  return left_out;
}

}  // namespace qif
