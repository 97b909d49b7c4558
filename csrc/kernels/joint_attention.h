// joint_attention over packed samples of mixed lengths: out = softmax(q k^T / sqrt(head_dim)) v for each sample and
// head, not causal. Products on tensor cores in T with float32 sums; softmax in float32, its weights rounded to T for
// the product with v (FlashAttention-2, arXiv 2307.08691).
//
// Backward, with P the weights and delta = sum(grad_out * out) of a row: grad_v = P^T grad_out,
// dS = P * (grad_out v^T - delta), grad_q = dS k / sqrt(head_dim), grad_k = dS^T q / sqrt(head_dim). One kernel gives
// grad_q, another grad_k and grad_v; each computes the weights anew, so that no sum needs atomics and every run gives
// the same bits.
#pragma once
#include <vector>

#include "common/cuda_dispatch.h"

namespace qif {

struct JointAttention {
  const void* q;                        // [sum of q_lens, heads, head_dim], 16-bit, aligned to 16 bytes like all others
  const void *k, *v;                    // [sum of k_lens, heads, head_dim]
  void* out;                            // like q
  float* lse;                           // [heads, sum of q_lens]: log of the sum of exp(scores) of each row
  std::vector<int64_t> q_lens, k_lens;  // rows of each sample
  int64_t heads, head_dim;              // head_dim 32, 64 or 128
  int dtype;
  // Forward: int32 [samples + 1] on the device, first row of each sample; not null: q_lens and k_lens tell the number
  // of samples and of all rows alone, so that a captured graph serves other lengths.
  const int32_t *cu_q = nullptr, *cu_k = nullptr;
};

struct JointAttentionBackward {
  JointAttention forward;  // out and lse are read
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v;
};

QIF_DECLARE_CUDA(joint_attention_forward, JointAttention)
int64_t joint_attention_backward_scratch(int64_t q_rows, int64_t heads);  // bytes
QIF_DECLARE_CUDA(joint_attention_backward, JointAttentionBackward)

}  // namespace qif
