// The Python module _C: one function per op and direction. Pointers come as integers; Python has checked everything.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/channel_norm_silu.h"
#include "kernels/conv3x3.h"
#include "kernels/gate_residual_norm_modulate.h"
#include "kernels/gelu_tanh.h"
#include "kernels/guided_step.h"
#include "kernels/layer_norm_modulate.h"
#include "kernels/qk_norm_rope.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace qif {

static Isa detect_isa() {
#if defined(QIF_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

static const Isa best_isa = detect_isa();
static Isa chosen_isa = best_isa;

Isa cpu_isa() { return chosen_isa; }

static const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}

// For tests and comparisons: every instruction set this CPU has can be made the current one.
static void set_isa(const std::string& name) {
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512})
    if (name == isa_name(isa) && isa <= best_isa) {
      chosen_isa = isa;
      return;
    }
  throw std::invalid_argument("set_isa: name must be one this CPU has (best: " + std::string(isa_name(best_isa)) +
                              "), got " + name);
}

template <class T = void>
static T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

static void layer_norm_modulate_forward(Address x, Address shift, Address scale, int64_t shift_stride,
                                        int64_t scale_stride, Address offsets, Address out, int64_t rows, int64_t width,
                                        int64_t segments, double eps, int dtype) {
  py::gil_scoped_release release;
  layer_norm_modulate_forward_cpu({pointer(x), pointer(shift), pointer(scale), shift_stride, scale_stride,
                                   pointer<int32_t>(offsets), pointer(out), rows, width, segments, eps, dtype});
}

static void layer_norm_modulate_backward(Address x, Address scale, int64_t scale_stride, Address offsets,
                                         Address grad_out, Address grad_x, Address grad_shift, Address grad_scale,
                                         int64_t rows, int64_t width, int64_t segments, double eps, int dtype) {
  py::gil_scoped_release release;
  layer_norm_modulate_backward_cpu({pointer(x), pointer(scale), scale_stride, pointer<int32_t>(offsets),
                                    pointer(grad_out), pointer(grad_x), pointer(grad_shift), pointer(grad_scale), rows,
                                    width, segments, eps, dtype});
}

static void gate_residual_norm_modulate_forward(Address x, Address y, Address gate, Address shift, Address scale,
                                                int64_t gate_stride, int64_t shift_stride, int64_t scale_stride,
                                                Address offsets, Address residual, Address out, int64_t rows,
                                                int64_t width, int64_t segments, double eps, int dtype) {
  py::gil_scoped_release release;
  gate_residual_norm_modulate_forward_cpu({pointer(x), pointer(y), pointer(gate), pointer(shift), pointer(scale),
                                           gate_stride, shift_stride, scale_stride, pointer<int32_t>(offsets),
                                           pointer(residual), pointer(out), rows, width, segments, eps, dtype});
}

static void gate_residual_norm_modulate_backward(Address residual, Address y, Address gate, Address scale,
                                                 int64_t gate_stride, int64_t scale_stride, Address offsets,
                                                 Address grad_residual, Address grad_out, Address grad_x,
                                                 Address grad_y, Address grad_gate, Address grad_shift,
                                                 Address grad_scale, int64_t rows, int64_t width, int64_t segments,
                                                 double eps, int dtype) {
  py::gil_scoped_release release;
  gate_residual_norm_modulate_backward_cpu(
      {pointer(residual), pointer(y), pointer(gate), pointer(scale), gate_stride, scale_stride,
       pointer<int32_t>(offsets), pointer(grad_residual), pointer(grad_out), pointer(grad_x), pointer(grad_y),
       pointer(grad_gate), pointer(grad_shift), pointer(grad_scale), rows, width, segments, eps, dtype});
}

// A stream as Python passes it: (q, k, v, q_stride, k_stride, v_stride, q_weight, k_weight, rope, cu, rows).
using Stream =
    std::tuple<Address, Address, Address, int64_t, int64_t, int64_t, Address, Address, Address, Address, int64_t>;

static QkNormRopeStream stream(const Stream& s) {
  const auto& [q, k, v, q_stride, k_stride, v_stride, q_weight, k_weight, rope, cu, rows] = s;
  return {
      pointer(q),        pointer(k),           pointer(v),           q_stride, k_stride, v_stride, pointer(q_weight),
      pointer(k_weight), pointer<float>(rope), pointer<int32_t>(cu), rows};
}

using StreamGrad = std::tuple<Address, Address, Address, Address, Address>;

static QkNormRopeStreamGrad stream_grad(const StreamGrad& s) {
  const auto& [q, k, v, q_weight, k_weight] = s;
  return {pointer(q), pointer(k), pointer(v), pointer(q_weight), pointer(k_weight)};
}

static void qk_norm_rope_forward(const Stream& txt, const Stream& img, Address q, Address k, Address v, int64_t samples,
                                 int64_t heads, int64_t head_dim, double eps, int dtype) {
  py::gil_scoped_release release;
  qk_norm_rope_forward_cpu(
      {stream(txt), stream(img), pointer(q), pointer(k), pointer(v), samples, heads, head_dim, eps, dtype});
}

static void qk_norm_rope_backward(const Stream& txt, const Stream& img, Address grad_q, Address grad_k, Address grad_v,
                                  int64_t samples, int64_t heads, int64_t head_dim, double eps, int dtype,
                                  const StreamGrad& txt_grad, const StreamGrad& img_grad) {
  py::gil_scoped_release release;
  qk_norm_rope_backward_cpu({{stream(txt), stream(img), pointer(grad_q), pointer(grad_k), pointer(grad_v), samples,
                              heads, head_dim, eps, dtype},
                             stream_grad(txt_grad),
                             stream_grad(img_grad)});
}

static void guided_step_forward(Address sample, Address cond, Address uncond, Address dt, Address offsets, Address out,
                                int64_t rows, int64_t channels, int64_t segments, double guidance, bool rescale,
                                int dtype) {
  py::gil_scoped_release release;
  guided_step_forward_cpu({pointer(sample), pointer(cond), pointer(uncond), pointer<float>(dt),
                           pointer<int32_t>(offsets), pointer(out), rows, channels, segments, guidance, rescale,
                           dtype});
}

static void guided_step_backward(Address cond, Address uncond, Address dt, Address offsets, Address grad_out,
                                 Address grad_cond, Address grad_uncond, int64_t rows, int64_t channels,
                                 int64_t segments, double guidance, bool rescale, int dtype) {
  py::gil_scoped_release release;
  guided_step_backward_cpu({{nullptr, pointer(cond), pointer(uncond), pointer<float>(dt), pointer<int32_t>(offsets),
                             pointer(grad_out), rows, channels, segments, guidance, rescale, dtype},
                            pointer(grad_cond),
                            pointer(grad_uncond)});
}

static void gelu_tanh_forward(Address x, Address out, int64_t elements, int dtype) {
  py::gil_scoped_release release;
  gelu_tanh_forward_cpu({pointer(x), pointer(out), elements, dtype});
}

static void gelu_tanh_backward(Address x, Address grad_out, Address grad_x, int64_t elements, int dtype) {
  py::gil_scoped_release release;
  gelu_tanh_backward_cpu({pointer(x), pointer(grad_out), pointer(grad_x), elements, dtype});
}

static void channel_norm_silu_forward(Address x, Address gamma, Address bias, Address out, int64_t rows,
                                      int64_t channels, bool silu, int dtype) {
  py::gil_scoped_release release;
  channel_norm_silu_forward_cpu({pointer(x), pointer(gamma), pointer(bias), pointer(out), rows, channels, silu, dtype});
}

static void channel_norm_silu_backward(Address x, Address gamma, Address bias, Address grad_out, Address grad_x,
                                       Address grad_gamma, Address grad_bias, int64_t rows, int64_t channels, bool silu,
                                       int dtype) {
  py::gil_scoped_release release;
  channel_norm_silu_backward_cpu({pointer(x), pointer(gamma), pointer(bias), pointer(grad_out), pointer(grad_x),
                                  pointer(grad_gamma), pointer(grad_bias), rows, channels, silu, dtype});
}

static void conv3x3_forward(Address x, Address packed, Address bias, Address residual, Address gamma, Address out,
                            int64_t batch, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels,
                            bool upsample, bool pad_rows, int dtype) {
  py::gil_scoped_release release;
  conv3x3_forward_cpu({pointer(x), pointer(packed), pointer(bias), pointer(residual), pointer(gamma), pointer(out),
                       batch, height, width, in_channels, out_channels, upsample, pad_rows, dtype});
}

static py::dict build_info() {
  py::dict info;
  info["version"] = QIF_VERSION;
  info["compiler"] = QIF_COMPILER;
  py::list sets;
  sets.append("baseline");
#if defined(QIF_X86)
  sets.append("avx2");
  sets.append("avx512");
#endif
  info["cpu_kernels"] = sets;
  info["cpu_best"] = isa_name(best_isa);
  info["cpu_in_use"] = isa_name(chosen_isa);
  info["openmp_threads"] = omp_get_max_threads();
  info["cuda_architectures"] = py::list();
  return info;
}

}  // namespace qif

PYBIND11_MODULE(_C, m) {
  m.def("layer_norm_modulate_forward", &qif::layer_norm_modulate_forward);
  m.def("layer_norm_modulate_backward", &qif::layer_norm_modulate_backward);
  m.def("gate_residual_norm_modulate_forward", &qif::gate_residual_norm_modulate_forward);
  m.def("gate_residual_norm_modulate_backward", &qif::gate_residual_norm_modulate_backward);
  m.def("qk_norm_rope_forward", &qif::qk_norm_rope_forward);
  m.def("qk_norm_rope_backward", &qif::qk_norm_rope_backward);
  m.def("guided_step_forward", &qif::guided_step_forward);
  m.def("guided_step_backward", &qif::guided_step_backward);
  m.def("gelu_tanh_forward", &qif::gelu_tanh_forward);
  m.def("gelu_tanh_backward", &qif::gelu_tanh_backward);
  m.def("channel_norm_silu_forward", &qif::channel_norm_silu_forward);
  m.def("channel_norm_silu_backward", &qif::channel_norm_silu_backward);
  m.def("conv3x3_forward", &qif::conv3x3_forward);
  m.def("build_info", &qif::build_info);
  m.def("set_isa", &qif::set_isa);
}
