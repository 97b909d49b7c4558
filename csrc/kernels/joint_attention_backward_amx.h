// The gradients of joint_attention in bfloat16 on the tile unit (AMX) of x86 CPUs (csrc/kernels/joint_attention_amx.h),
// from its output and the logarithms of its sums. With scores s = q k^T / sqrt(head_dim) and weights p = exp(s - lse):
//
//   dv = p^T dout,  dp = dout v^T,  ds = p (dp - sum(dout out)),  dq = ds k / sqrt(head_dim),  dk = ds^T q /
//   sqrt(head_dim)
//
// (FlashAttention-2, arXiv 2307.08691, algorithm 2). Products are sums in float32; p and ds are rounded to bfloat16 for
// them. No weight is larger than 1 and a bit, whatever the scores are.
//
// A task is a head of a sample; what it gives depends on nothing else.
#pragma once
#include <cstdint>
#include <vector>

namespace qif {

struct AmxAttentionBackward {
  const void *q, *k, *v, *out, *grad_out;  // bfloat16: [sum of q_lens, heads, head_dim], k and v with k_lens
  const float* lse;                        // [heads, sum of q_lens]
  void *grad_q, *grad_k, *grad_v;          // contiguous
  // Numbers from one row of q, k, v, out and grad_out to the next; heads are contiguous.
  int64_t q_stride, k_stride, v_stride, out_stride, grad_stride;
  std::vector<int64_t> q_lens, k_lens;  // rows of each sample
  int64_t heads, head_dim;              // head_dim 32, 64, 96 or 128
};

// The calling threads keep 20 bytes for each number of a head of q for the next call.
void joint_attention_backward_amx(const AmxAttentionBackward& p);

}  // namespace qif
