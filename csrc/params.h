// What Python passes to an op, as the op's params struct: pointers come as integers. Shared by the CPU and the CUDA
// functions of the module; Python has checked everything.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "kernels/channel_norm_silu.h"
#include "kernels/conv2d.h"
#include "kernels/conv3x3.h"
#include "kernels/gate_residual_norm_modulate.h"
#include "kernels/gelu_tanh.h"
#include "kernels/guided_step.h"
#include "kernels/int4_quantise.h"
#include "kernels/int8_rows.h"
#include "kernels/joint_attention.h"
#include "kernels/layer_norm_modulate.h"
#include "kernels/linear_amx.h"
#include "kernels/linear_group.h"
#include "kernels/linear_int8.h"
#include "kernels/picture_statistics.h"
#include "kernels/qk_norm_rope.h"

namespace qif {

using Address = uintptr_t;

template <class T = void>
inline T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

inline LayerNormModulate layer_norm_modulate(Address x, Address shift, Address scale, int64_t shift_stride,
                                             int64_t scale_stride, Address offsets, Address out, int64_t rows,
                                             int64_t width, int64_t segments, double eps, int dtype) {
  return {pointer(x),   pointer(shift), pointer(scale), shift_stride, scale_stride, pointer<int32_t>(offsets),
          pointer(out), rows,           width,          segments,     eps,          dtype};
}

inline LayerNormModulateFp8 layer_norm_modulate_fp8(Address x, Address shift, Address scale, int64_t shift_stride,
                                                    int64_t scale_stride, Address offsets, Address out, int64_t rows,
                                                    int64_t width, int64_t segments, double eps, int dtype,
                                                    Address values, Address scales) {
  return {
      layer_norm_modulate(x, shift, scale, shift_stride, scale_stride, offsets, out, rows, width, segments, eps, dtype),
      pointer(values), pointer<float>(scales)};
}

inline LayerNormModulateBackward layer_norm_modulate_backward(Address x, Address scale, int64_t scale_stride,
                                                              Address offsets, Address grad_out, Address grad_x,
                                                              Address grad_shift, Address grad_scale, int64_t rows,
                                                              int64_t width, int64_t segments, double eps, int dtype) {
  return {pointer(x),
          pointer(scale),
          scale_stride,
          pointer<int32_t>(offsets),
          pointer(grad_out),
          pointer(grad_x),
          pointer(grad_shift),
          pointer(grad_scale),
          rows,
          width,
          segments,
          eps,
          dtype};
}

inline GateResidualNormModulate gate_residual_norm_modulate(Address x, Address y, Address gate, Address shift,
                                                            Address scale, int64_t gate_stride, int64_t shift_stride,
                                                            int64_t scale_stride, Address offsets, Address residual,
                                                            Address out, int64_t rows, int64_t width, int64_t segments,
                                                            double eps, int dtype) {
  return {pointer(x),
          pointer(y),
          pointer(gate),
          pointer(shift),
          pointer(scale),
          gate_stride,
          shift_stride,
          scale_stride,
          pointer<int32_t>(offsets),
          pointer(residual),
          pointer(out),
          rows,
          width,
          segments,
          eps,
          dtype};
}

inline GateResidualNormModulateFp8 gate_residual_norm_modulate_fp8(
    Address x, Address y, Address gate, Address shift, Address scale, int64_t gate_stride, int64_t shift_stride,
    int64_t scale_stride, Address offsets, Address residual, Address out, int64_t rows, int64_t width, int64_t segments,
    double eps, int dtype, Address values, Address scales) {
  return {gate_residual_norm_modulate(x, y, gate, shift, scale, gate_stride, shift_stride, scale_stride, offsets,
                                      residual, out, rows, width, segments, eps, dtype),
          pointer(values), pointer<float>(scales)};
}

inline GateResidualNormModulateBackward gate_residual_norm_modulate_backward(
    Address residual, Address y, Address gate, Address scale, int64_t gate_stride, int64_t scale_stride,
    Address offsets, Address grad_residual, Address grad_out, Address grad_x, Address grad_y, Address grad_gate,
    Address grad_shift, Address grad_scale, int64_t rows, int64_t width, int64_t segments, double eps, int dtype) {
  return {pointer(residual),
          pointer(y),
          pointer(gate),
          pointer(scale),
          gate_stride,
          scale_stride,
          pointer<int32_t>(offsets),
          pointer(grad_residual),
          pointer(grad_out),
          pointer(grad_x),
          pointer(grad_y),
          pointer(grad_gate),
          pointer(grad_shift),
          pointer(grad_scale),
          rows,
          width,
          segments,
          eps,
          dtype};
}

// A stream as Python passes it: (q, k, v, q_stride, k_stride, v_stride, q_weight, k_weight, rope, cu, rows).
using Stream =
    std::tuple<Address, Address, Address, int64_t, int64_t, int64_t, Address, Address, Address, Address, int64_t>;

inline QkNormRopeStream stream(const Stream& s) {
  const auto& [q, k, v, q_stride, k_stride, v_stride, q_weight, k_weight, rope, cu, rows] = s;
  return {
      pointer(q),        pointer(k),           pointer(v),           q_stride, k_stride, v_stride, pointer(q_weight),
      pointer(k_weight), pointer<float>(rope), pointer<int32_t>(cu), rows};
}

using StreamGrad = std::tuple<Address, Address, Address, Address, Address>;

inline QkNormRopeStreamGrad stream_grad(const StreamGrad& s) {
  const auto& [q, k, v, q_weight, k_weight] = s;
  return {pointer(q), pointer(k), pointer(v), pointer(q_weight), pointer(k_weight)};
}

inline QkNormRope qk_norm_rope(const Stream& txt, const Stream& img, Address q, Address k, Address v, int64_t samples,
                               int64_t heads, int64_t head_dim, double eps, int dtype) {
  return {stream(txt), stream(img), pointer(q), pointer(k), pointer(v), samples, heads, head_dim, eps, dtype};
}

inline QkNormRopeBackward qk_norm_rope_backward(const Stream& txt, const Stream& img, Address grad_q, Address grad_k,
                                                Address grad_v, int64_t samples, int64_t heads, int64_t head_dim,
                                                double eps, int dtype, const StreamGrad& txt_grad,
                                                const StreamGrad& img_grad) {
  return {qk_norm_rope(txt, img, grad_q, grad_k, grad_v, samples, heads, head_dim, eps, dtype), stream_grad(txt_grad),
          stream_grad(img_grad)};
}

inline GuidedStep guided_step(Address sample, Address cond, Address uncond, Address dt, Address offsets, Address out,
                              int64_t rows, int64_t channels, int64_t segments, double guidance, bool rescale,
                              int dtype) {
  return {pointer(sample), pointer(cond), pointer(uncond), pointer<float>(dt), pointer<int32_t>(offsets),
          pointer(out),    rows,          channels,        segments,           guidance,
          rescale,         dtype};
}

inline GuidedStepBackward guided_step_backward(Address cond, Address uncond, Address dt, Address offsets,
                                               Address grad_out, Address grad_cond, Address grad_uncond, int64_t rows,
                                               int64_t channels, int64_t segments, double guidance, bool rescale,
                                               int dtype) {
  return {guided_step(0, cond, uncond, dt, offsets, grad_out, rows, channels, segments, guidance, rescale, dtype),
          pointer(grad_cond), pointer(grad_uncond)};
}

inline JointAttention joint_attention(Address q, Address k, Address v, Address out, Address lse,
                                      std::vector<int64_t> q_lens, std::vector<int64_t> k_lens, int64_t heads,
                                      int64_t head_dim, int dtype, Address cu_q, Address cu_k) {
  return {pointer(q), pointer(k), pointer(v), pointer(out), pointer<float>(lse),    q_lens,
          k_lens,     heads,      head_dim,   dtype,        pointer<int32_t>(cu_q), pointer<int32_t>(cu_k)};
}

inline JointAttentionBackward joint_attention_backward(Address q, Address k, Address v, Address out, Address lse,
                                                       std::vector<int64_t> q_lens, std::vector<int64_t> k_lens,
                                                       int64_t heads, int64_t head_dim, int dtype, Address grad_out,
                                                       Address grad_q, Address grad_k, Address grad_v) {
  return {joint_attention(q, k, v, out, lse, q_lens, k_lens, heads, head_dim, dtype, 0, 0), pointer(grad_out),
          pointer(grad_q), pointer(grad_k), pointer(grad_v)};
}

inline GeluTanh gelu_tanh(Address x, Address out, int64_t elements, int dtype) {
  return {pointer(x), pointer(out), elements, dtype};
}

inline GeluTanhBackward gelu_tanh_backward(Address x, Address grad_out, Address grad_x, int64_t elements, int dtype) {
  return {pointer(x), pointer(grad_out), pointer(grad_x), elements, dtype};
}

inline Conv2d conv2d(Address x, Address weight, Address bias, Address residual, Address out, int64_t batch,
                     int64_t height, int64_t width, int64_t in_channels, int64_t out_channels, int64_t kernel_height,
                     int64_t kernel_width, int64_t pad_height, int64_t pad_width, int dtype) {
  return {pointer(x),  pointer(weight), pointer(bias), pointer(residual), pointer(out), batch,     height, width,
          in_channels, out_channels,    kernel_height, kernel_width,      pad_height,   pad_width, dtype};
}

inline ChannelNormSilu channel_norm_silu(Address x, Address gamma, Address bias, Address out, int64_t rows,
                                         int64_t channels, bool silu, int dtype) {
  return {pointer(x), pointer(gamma), pointer(bias), pointer(out), rows, channels, silu, dtype, nullptr, nullptr};
}

inline ChannelNormSilu add_channel_norm_silu(Address x, Address added, Address residual, Address gamma, Address out,
                                             int64_t rows, int64_t channels, int dtype) {
  return {pointer(x), pointer(gamma), nullptr, pointer(out),   rows,
          channels,   true,           dtype,   pointer(added), pointer(residual)};
}

inline ChannelNormSiluBackward channel_norm_silu_backward(Address x, Address gamma, Address bias, Address grad_out,
                                                          Address grad_x, Address grad_gamma, Address grad_bias,
                                                          int64_t rows, int64_t channels, bool silu, int dtype) {
  return {pointer(x),
          pointer(gamma),
          pointer(bias),
          pointer(grad_out),
          pointer(grad_x),
          pointer(grad_gamma),
          pointer(grad_bias),
          rows,
          channels,
          silu,
          dtype};
}

inline Conv3x3 conv3x3(Address x, Address packed, Address bias, Address residual, Address gamma, Address out,
                       int64_t batch, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels,
                       bool upsample, bool pad_rows, int dtype) {
  return {pointer(x), pointer(packed), pointer(bias), pointer(residual), pointer(gamma), pointer(out), batch,
          height,     width,           in_channels,   out_channels,      upsample,       pad_rows,     dtype};
}

// One product as Python passes it: (x, weight, bias, out, rows, residual, gate, gate_stride, offsets, segments).
using LinearArguments =
    std::tuple<Address, Address, Address, Address, int64_t, Address, Address, int64_t, Address, int64_t>;

inline LinearGroup linear_group(const std::vector<LinearArguments>& linears, int64_t columns, int64_t depth, int tile,
                                int dtype) {
  LinearGroup group = {{}, static_cast<int>(linears.size()), columns, depth, tile, dtype};
  for (size_t i = 0; i < linears.size(); ++i) {
    const auto& [x, weight, bias, out, rows, residual, gate, gate_stride, offsets, segments] = linears[i];
    group.linear[i] = {
        pointer(x),  pointer(weight),           pointer(bias), pointer(out), rows, pointer(residual), pointer(gate),
        gate_stride, pointer<int32_t>(offsets), segments};
  }
  return group;
}

// One product as Python passes it: (a, strides of a, b, strides of b, bias, out, rows, columns, depth).
using AmxArguments =
    std::tuple<Address, int64_t, int64_t, Address, int64_t, int64_t, Address, Address, int64_t, int64_t, int64_t>;

inline std::vector<AmxProduct> amx_products(const std::vector<AmxArguments>& products) {
  std::vector<AmxProduct> found;
  for (const auto& [a, a_row, a_depth, b, b_row, b_depth, bias, out, rows, columns, depth] : products)
    found.push_back({pointer<float>(a), a_row, a_depth, pointer<float>(b), b_row, b_depth, pointer<float>(bias),
                     pointer<float>(out), rows, columns, depth});
  return found;
}

inline Int8Rows int8_rows(Address x, int64_t stride, Address values, Address scales, int64_t rows, int64_t width,
                          int64_t group, bool gelu, int dtype) {
  return {pointer(x), stride, pointer<uint8_t>(values), pointer<float>(scales), rows, width, group, gelu, dtype, false};
}

inline Int8Rows int8_rows_fp8(Address x, int64_t stride, Address values, Address scales, int64_t rows, int64_t width,
                              int64_t group, bool gelu, int dtype) {
  Int8Rows p = int8_rows(x, stride, values, scales, rows, width, group, gelu, dtype);
  p.float8 = true;
  return p;
}

inline Int4Quantise int4_quantise(Address weight, Address packed, Address scales, Address sums, int64_t columns,
                                  int64_t depth) {
  return {
      pointer<float>(weight), pointer<uint8_t>(packed), pointer<float>(scales), pointer<int32_t>(sums), columns, depth};
}

inline Int4Unpack int4_unpack_all(Address packed, Address out, int64_t tiles) {
  return {pointer<uint8_t>(packed), pointer<int8_t>(out), tiles};
}

inline Int8Pack int8_pack(Address weight, Address packed, Address sums, int64_t columns, int64_t depth) {
  return {pointer<int8_t>(weight), pointer<int8_t>(packed), pointer<int32_t>(sums), columns, depth};
}

// One product as Python passes it: (values, scales, rows, depth), (weight, its scales, its sums, bias, columns), out,
// (residual, gate, gate_stride, offsets, segments).
using Int8Arguments =
    std::tuple<std::tuple<Address, Address, int64_t, int64_t>, std::tuple<Address, Address, Address, Address, int64_t>,
               Address, std::tuple<Address, Address, int64_t, Address, int64_t>>;

// four: which weights are in 4 bits; empty: none.
inline std::vector<Int8Product> int8_products(const std::vector<Int8Arguments>& products, int dtype,
                                              const std::vector<bool>& four) {
  std::vector<Int8Product> found;
  for (const auto& [x, w, out, gated] : products) {
    const auto& [values, scales, rows, depth] = x;
    const auto& [weight, weight_scales, sums, bias, columns] = w;
    const auto& [residual, gate, gate_stride, offsets, segments] = gated;
    found.push_back({pointer<uint8_t>(values), pointer<float>(scales), pointer<int8_t>(weight),
                     pointer<float>(weight_scales), pointer<int32_t>(sums), pointer(bias), pointer(out), rows, columns,
                     depth, pointer(residual), pointer(gate), gate_stride, pointer<int32_t>(offsets), segments, dtype,
                     !four.empty() && four.at(found.size())});
  }
  return found;
}

inline PictureStatistics picture_statistics(Address rgb, Address luma, Address histogram, Address sums, int64_t height,
                                            int64_t width) {
  return {
      pointer<uint8_t>(rgb), pointer<float>(luma), pointer<int64_t>(histogram), pointer<double>(sums), height, width};
}

}  // namespace qif
