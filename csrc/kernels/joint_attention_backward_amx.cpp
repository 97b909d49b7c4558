#include "kernels/joint_attention_backward_amx.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "kernels/joint_attention_tiles.h"

// Scores are made transposed, a row for each key: so weights lie as left operands of dv and dk need them, and pairs of
// their rows as right operands of dq^T.
namespace qif {

namespace {

using namespace amx;

constexpr int64_t kKeyBlocks = 4, kRowBlocks = 8;  // of 32, of an item
constexpr int64_t kKeys = kKeyBlocks * kBlock;
constexpr int64_t kMostDim = 128;
constexpr int64_t kSums = kBlock * kBlock;

// Of all query rows of a head, in blocks of 32.
struct Rows {
  Bits *q, *grad;                // as right operands of scores: [blocks][32 * dim]
  Bits *q_values, *grad_values;  // as those of dk and dv: [dim / 16][blocks] tiles
  float *lse, *delta;            // in powers of two; sum(dout out)
  float* grad_q;                 // dq^T: [blocks][dim / 32][32][32]
  int64_t blocks;
};

struct alignas(64) Memory {
  Bits k[kKeys * kMostDim], v[kKeys * kMostDim];  // left operands of scores
  Bits k_columns[kKeys * kMostDim];               // left operand of dq^T: [dim / 16][kKeyBlocks] tiles
  Bits pairs[kBlock * kMostDim];
  // p and ds as left operands: [2 kKeyBlocks][kRowBlocks] tiles; ds as right one: [2 kRowBlocks][kKeyBlocks].
  Bits p[kKeys * kRowBlocks * kBlock], ds[kKeys * kRowBlocks * kBlock], ds_pairs[kKeys * kRowBlocks * kBlock];
  float scores[2][kSums], grads[2][kSums];  // s and dp of a block, and of the one before
  float grad_k[kKeys * kMostDim], grad_v[kKeys * kMostDim];
};

void pack_queries(const Matrix& q, const Matrix& grad, const Matrix& out, const float* lse, const Rows& to) {
  const int64_t dim = q.dim, panel = to.blocks * kTile;
  for (int64_t block = 0; block < to.blocks; ++block) {
    const int64_t first = block * kBlock;
    pack_keys(q, first, to.q + first * dim);
    pack_keys(grad, first, to.grad + first * dim);
    pack_values(q, first, to.q_values + block * kTile, panel);
    pack_values(grad, first, to.grad_values + block * kTile, panel);
    for (int64_t r = first; r < first + kBlock; ++r) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < dim; d += 32)
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(grad.part(r, d)),
                               reinterpret_cast<__m512bh>(out.part(r, d)));
      to.delta[r] = _mm512_reduce_add_ps(sum);
      to.lse[r] = r < q.rows ? lse[r] * kLog2E : 1e30f;  // rows that are none have weights of 0
    }
  }
}

void pack_item_keys(const Matrix& k, const Matrix& v, int64_t first, int64_t blocks, Memory& m) {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = first + block * kBlock;
    pack_rows(k, from, m.k + block * kBlock * k.dim);
    pack_rows(v, from, m.v + block * kBlock * k.dim);
    pack_values(k, from, m.pairs, kTile);
    for (int64_t d = 0; d < k.dim / 16; ++d) {
      __m512i rows[16];
      for (int64_t r = 0; r < 16; ++r) rows[r] = _mm512_load_si512(m.pairs + d * kTile + 32 * r);
      transpose(rows, m.k_columns + (d * kKeyBlocks + block) * kTile);
    }
  }
}

// p and ds of two keys after each other, with the 32 rows of a block; `there`: how many of the two are keys.
struct Weigh {
  __m512 scale, lse[2], delta[2];
  Pairs pairs;

  Weigh(const float* lse_of, const float* delta_of, float factor) : scale(_mm512_set1_ps(factor)) {
    for (int64_t i = 0; i < 2; ++i)
      lse[i] = _mm512_load_ps(lse_of + 16 * i), delta[i] = _mm512_load_ps(delta_of + 16 * i);
  }

  void operator()(const float* scores, const float* grads, int64_t there, Bits* p, Bits* ds, Bits* ds_pairs) const {
    __m512i rounded[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t r = 0; r < 2; ++r, scores += kBlock, grads += kBlock) {
      __m512i weights = _mm512_setzero_si512();
      if (r < there) {
        __m512 w[2], g[2];
        for (int64_t i = 0; i < 2; ++i) {
          w[i] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + 16 * i), scale, lse[i]));
          g[i] = _mm512_mul_ps(w[i], _mm512_sub_ps(_mm512_load_ps(grads + 16 * i), delta[i]));
        }
        weights = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(w[1], w[0]));
        rounded[r] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(g[1], g[0]));
      }
      _mm512_store_si512(p + 32 * r, weights);
      _mm512_store_si512(ds + 32 * r, rounded[r]);
    }
    _mm512_store_si512(ds_pairs, pairs.first(rounded[0], rounded[1]));
    _mm512_store_si512(ds_pairs + kKeyBlocks * kTile, pairs.last(rounded[0], rounded[1]));
  }
};

// Some keys with all rows.
struct Item {
  const Rows& rows;
  Memory& m;
  int64_t dim, keys;  // keys: from the item's first on
  float scale;

  int64_t key_blocks() const { return std::min(kKeyBlocks, ceil_div(keys, kBlock)); }

  // p and ds of the item's keys with blocks [first, first + count) of rows. The vectors work on a block while the unit
  // makes the scores of the next.
  void weigh(int64_t first, int64_t count) const {
    const int64_t blocks = key_blocks() * count, steps = dim / 32;
    const int64_t pace = ceil_div(16, 2 * steps);  // pairs of keys a step
    for (int64_t i = 0; i <= blocks; ++i) {
      int64_t pair = i == 0 ? 16 : 0;
      const int64_t before = std::max<int64_t>(i - 1, 0), block = before % key_blocks(), row = before / key_blocks();
      const float *scores = m.scores[before % 2], *grads = m.grads[before % 2];
      const Weigh weigh_two(rows.lse + (first + row) * kBlock, rows.delta + (first + row) * kBlock, scale);
      const auto some = [&](int64_t end) {
        for (; pair < end; ++pair) {
          const int64_t tile = ((2 * block + pair / 8) * kRowBlocks + row) * kTile + pair % 8 * 64;
          weigh_two(scores + pair * 2 * kBlock, grads + pair * 2 * kBlock, keys - block * kBlock - 2 * pair, m.p + tile,
                    m.ds + tile, m.ds_pairs + (2 * row * kKeyBlocks + block) * kTile + pair * 32);
        }
      };
      if (i < blocks) {
        const auto between = [&] { some(std::min<int64_t>(16, pair + pace)); };
        const int64_t k = i % key_blocks() * kBlock * dim, r = (first + i / key_blocks()) * kBlock * dim;
        multiply(m.k + k, 16 * dim, rows.q + r, 16 * dim, steps, m.scores[i % 2], kBlock, false, between);
        multiply(m.v + k, 16 * dim, rows.grad + r, 16 * dim, steps, m.grads[i % 2], kBlock, false, between);
      }
      some(16);
    }
  }

  void sum(int64_t first, int64_t count, bool first_keys) const {
    const auto nothing = [] {};
    const int64_t panel = rows.blocks * kTile, blocks = key_blocks();
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t d = 0; d < dim; d += kBlock) {
        const int64_t left = 2 * block * kRowBlocks * kTile, right = d / 16 * panel + first * kTile;
        const int64_t to = block * kBlock * dim + d;
        multiply(m.p + left, kRowBlocks * kTile, rows.grad_values + right, panel, count, m.grad_v + to, dim, first > 0,
                 nothing);
        multiply(m.ds + left, kRowBlocks * kTile, rows.q_values + right, panel, count, m.grad_k + to, dim, first > 0,
                 nothing);
      }
    for (int64_t row = 0; row < count; ++row)
      for (int64_t d = 0; d < dim / kBlock; ++d)
        multiply(m.k_columns + 2 * d * kKeyBlocks * kTile, kKeyBlocks * kTile,
                 m.ds_pairs + 2 * row * kKeyBlocks * kTile, kKeyBlocks * kTile, blocks,
                 rows.grad_q + ((first + row) * (dim / kBlock) + d) * kSums, kBlock, !first_keys, nothing);
  }
};

void store(const float* low, const float* high, float factor, Bits* to) {
  const __m512 by = _mm512_set1_ps(factor);
  const __m512bh rounded =
      _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_load_ps(high), by), _mm512_mul_ps(_mm512_load_ps(low), by));
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(rounded));
}

// dq of a head from dq^T.
void store_grad_q(const Rows& rows, int64_t count, int64_t dim, float factor, Bits* to, int64_t stride) {
  alignas(64) float turned[2][16 * 16];
  for (int64_t block = 0; block < rows.blocks; ++block)
    for (int64_t d = 0; d < dim / kBlock; ++d)
      for (int64_t half = 0; half < 2; ++half) {
        const float* from = rows.grad_q + (block * (dim / kBlock) + d) * kSums + 16 * half;
        for (int64_t part = 0; part < 2; ++part) {
          __m512i lines[16];
          for (int64_t i = 0; i < 16; ++i) lines[i] = _mm512_load_si512(from + (16 * part + i) * kBlock);
          transpose(lines, turned[part]);
        }
        const int64_t first = block * kBlock + 16 * half;
        for (int64_t r = 0; r < std::min<int64_t>(16, count - first); ++r)
          store(turned[0] + 16 * r, turned[1] + 16 * r, factor, to + (first + r) * stride + d * kBlock);
      }
}

struct Head {
  Matrix q, k, v, out, grad_out;
  const float* lse;
  Bits *grad_q, *grad_k, *grad_v;
  int64_t stride;  // of the gradients

  void run() const {
    const int64_t dim = q.dim, blocks = ceil_div(q.rows, kBlock), size = blocks * kBlock * dim;
    char* memory = scratch<Rows>(size * (4 * sizeof(Bits) + sizeof(float)) + blocks * kBlock * 2 * sizeof(float));
    Bits* const packed = reinterpret_cast<Bits*>(memory);
    float* const sums = reinterpret_cast<float*>(packed + 4 * size);
    const Rows rows{
        packed, packed + size, packed + 2 * size, packed + 3 * size, sums + size, sums + size + blocks * kBlock,
        sums,   blocks};
    pack_queries(q, grad_out, out, lse, rows);
    const float share = 1 / std::sqrt(static_cast<float>(dim));
    Memory& m = *reinterpret_cast<Memory*>(scratch<Memory>(sizeof(Memory)));
    for (int64_t key = 0; key < k.rows; key += kKeys) {
      const Item item{rows, m, dim, k.rows - key, share * kLog2E};
      pack_item_keys(k, v, key, item.key_blocks(), m);
      if (blocks == 0)
        std::fill(m.grad_k, m.grad_k + kKeys * dim, 0.0f), std::fill(m.grad_v, m.grad_v + kKeys * dim, 0.0f);
      for (int64_t first = 0; first < blocks; first += kRowBlocks) {
        const int64_t count = std::min(kRowBlocks, blocks - first);
        item.weigh(first, count);
        item.sum(first, count, key == 0);
      }
      for (int64_t r = 0; r < std::min(kKeys, k.rows - key); ++r)
        for (int64_t d = 0; d < dim; d += kBlock) {
          const float *dk = m.grad_k + r * dim + d, *dv = m.grad_v + r * dim + d;
          store(dk, dk + 16, share, grad_k + (key + r) * stride + d);
          store(dv, dv + 16, 1, grad_v + (key + r) * stride + d);
        }
    }
    store_grad_q(rows, q.rows, dim, share, grad_q, stride);
  }
};

}  // namespace

void joint_attention_backward_amx(const AmxAttentionBackward& p) {
  const int64_t dim = p.head_dim, width = p.heads * dim;
  int64_t total = 0, q0 = 0, k0 = 0;
  for (const int64_t n : p.q_lens) total += n;
  std::vector<Head> heads;
  for (size_t sample = 0; sample < p.q_lens.size(); q0 += p.q_lens[sample], k0 += p.k_lens[sample], ++sample)
    for (int64_t h = 0; h < p.heads; ++h) {
      const auto part = [&](const void* of, int64_t first, int64_t rows, int64_t stride) {
        return Matrix{static_cast<const Bits*>(of) + first * stride + h * dim, rows, dim, stride};
      };
      const auto to = [&](void* of, int64_t first) { return static_cast<Bits*>(of) + first * width + h * dim; };
      const int64_t rows = p.q_lens[sample], keys = p.k_lens[sample];
      heads.push_back({part(p.q, q0, rows, p.q_stride), part(p.k, k0, keys, p.k_stride),
                       part(p.v, k0, keys, p.v_stride), part(p.out, q0, rows, p.out_stride),
                       part(p.grad_out, q0, rows, p.grad_stride), p.lse + h * total + q0, to(p.grad_q, q0),
                       to(p.grad_k, k0), to(p.grad_v, k0), width});
    }
  const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
    (void)tiles;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < heads.size(); ++i) heads[i].run();
  }
}

}  // namespace qif
