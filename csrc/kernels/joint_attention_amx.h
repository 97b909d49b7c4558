// joint_attention in bfloat16 on the tile unit (AMX) of x86 CPUs: out = softmax(q k^T / sqrt(head_dim)) v for each
// sample and head, not causal.
//
// Scores are sums in float32. Weights are 2^(score log2(e) - shift) by a polynomial, rounded to bfloat16 for the
// product with v and for their own sum, so that they add up to 1. |q| |k| bounds the scores of a head: no score is
// looked for that is the largest, and no sum is rescaled, as in FlashAttention-2 (arXiv 2307.08691), whose order of
// work this is. The bound is far from the limit where q and k are normalised, as the transformer's are.
//
// A task is 128 rows of a head. Vectors turn scores into weights while the unit multiplies. What an element gives
// depends on its sample alone, not on the threads or on the other samples.
#pragma once
#include <cstdint>
#include <vector>

namespace qif {

struct AmxAttention {
  const void* q;                         // [sum of q_lens, heads, head_dim], bfloat16
  const void *k, *v;                     // [sum of k_lens, heads, head_dim]
  void* out;                             // like q, contiguous
  float* lse;                            // [heads, sum of q_lens]: log of the sum of exp(scores) of each row
  int64_t q_stride, k_stride, v_stride;  // numbers from one row to the next; heads are contiguous
  std::vector<int64_t> q_lens, k_lens;   // rows of each sample; of keys at least 1
  int64_t heads, head_dim;               // head_dim 32, 64, 96 or 128
};

// Returns the samples whose scores may be too large, or are no numbers: what stands in their rows of out and lse is not
// to be used. The calling threads keep up to 25 MB for the next call.
std::vector<int64_t> joint_attention_amx(const AmxAttention& p);

}  // namespace qif
