// The Python module _C: one function per op and direction, and with CUDA one more of each (bindings_cuda.cpp).
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings_cuda.h"
#include "kernels/joint_attention_amx.h"
#include "kernels/joint_attention_backward_amx.h"
#include "params.h"

namespace py = pybind11;

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
Isa cpu_isa_at_best() { return best_isa; }

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

// Of the units that multiply 8-bit numbers: a name for each that this build and this CPU have, the best last.
static const std::vector<std::pair<std::string, Int8Unit>>& int8_units() {
  static const auto units = [] {
    std::vector<std::pair<std::string, Int8Unit>> found;
    for (const auto& [name, unit] : {std::pair<const char*, Int8Unit>{"plain", Int8Unit::kPlain},
                                     {"avx2", Int8Unit::kAvx2},
                                     {"avx_vnni", Int8Unit::kAvxVnni},
                                     {"avx512_vnni", Int8Unit::kAvx512Vnni},
                                     {"amx", Int8Unit::kAmx}})
      if (int8_unit_available(unit)) found.emplace_back(name, unit);
    return found;
  }();
  return units;
}

static Int8Unit int8_unit(const std::string& name) {
  for (const auto& [known, unit] : int8_units())
    if (known == name) return unit;
  throw std::invalid_argument("linear_int8: unit must be one this CPU has, got " + name);
}

// name(...): params from what Python passes, then the kernel.
template <class Params, class... A>
static void define(py::module_& m, const char* name, Params (*params)(A...), void (*kernel)(const Params&)) {
  m.def(name, [params, kernel](A... a) {
    const Params p = params(a...);
    py::gil_scoped_release release;
    kernel(p);
  });
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
#if defined(QIF_AMX)
  info["amx"] = amx_available();
#else
  info["amx"] = false;
#endif
  py::list units;
  for (const auto& unit : int8_units()) units.append(unit.first);
  info["int8_units"] = units;
  info["openmp_threads"] = omp_get_max_threads();
  py::list architectures;
#if defined(QIF_CUDA_ARCHITECTURES)
  std::istringstream names(QIF_CUDA_ARCHITECTURES);
  for (std::string name; names >> name;) architectures.append("sm_" + name);
  info["cuda_version"] = cuda_version();
#endif
  info["cuda_architectures"] = architectures;
  return info;
}

}  // namespace qif

PYBIND11_MODULE(_C, m) {
  using namespace qif;
  define(m, "layer_norm_modulate_forward", layer_norm_modulate, layer_norm_modulate_forward_cpu);
  define(m, "layer_norm_modulate_backward", layer_norm_modulate_backward, layer_norm_modulate_backward_cpu);
  define(m, "gate_residual_norm_modulate_forward", gate_residual_norm_modulate,
         gate_residual_norm_modulate_forward_cpu);
  define(m, "gate_residual_norm_modulate_backward", gate_residual_norm_modulate_backward,
         gate_residual_norm_modulate_backward_cpu);
  define(m, "qk_norm_rope_forward", qk_norm_rope, qk_norm_rope_forward_cpu);
  define(m, "qk_norm_rope_backward", qk_norm_rope_backward, qk_norm_rope_backward_cpu);
  define(m, "guided_step_forward", guided_step, guided_step_forward_cpu);
  define(m, "guided_step_backward", guided_step_backward, guided_step_backward_cpu);
  define(m, "gelu_tanh_forward", gelu_tanh, gelu_tanh_forward_cpu);
  define(m, "gelu_tanh_backward", gelu_tanh_backward, gelu_tanh_backward_cpu);
  define(m, "channel_norm_silu_forward", channel_norm_silu, channel_norm_silu_forward_cpu);
  define(m, "channel_norm_silu_backward", channel_norm_silu_backward, channel_norm_silu_backward_cpu);
  define(m, "conv3x3_forward", conv3x3, conv3x3_forward_cpu);
  define(m, "picture_statistics", picture_statistics, picture_statistics_cpu);
  define(m, "int8_rows", int8_rows, int8_rows_cpu);
  define(m, "int8_pack", int8_pack, int8_pack_cpu);
  define(m, "int4_quantise", int4_quantise, int4_quantise_cpu);
  define(m, "int4_unpack", int4_unpack_all, int4_unpack_all_cpu);
  m.def(
      "linear_int8",
      [](const std::vector<Int8Arguments>& products, int dtype, const std::string& unit,
         const std::vector<bool>& four) {
        const std::vector<Int8Product> p = int8_products(products, dtype, four);
        const Int8Unit with = int8_unit(unit);
        py::gil_scoped_release release;
        linear_int8(p.data(), static_cast<int64_t>(p.size()), with);
      },
      py::arg("products"), py::arg("dtype"), py::arg("unit"), py::arg("four") = std::vector<bool>());
#if defined(QIF_AMX)
  m.def("amx_products", [](const std::vector<AmxArguments>& products) {
    const std::vector<AmxProduct> p = amx_products(products);
    py::gil_scoped_release release;
    return amx_products(p.data(), static_cast<int64_t>(p.size()));
  });
  m.def("joint_attention_amx",
        [](Address q, Address k, Address v, Address out, Address lse, const std::array<int64_t, 3>& strides,
           const std::vector<int64_t>& q_lens, const std::vector<int64_t>& k_lens, int64_t heads, int64_t head_dim) {
          const AmxAttention p{pointer(q), pointer(k), pointer(v), pointer(out), pointer<float>(lse),
                               strides[0], strides[1], strides[2], q_lens,       k_lens,
                               heads,      head_dim};
          py::gil_scoped_release release;
          return joint_attention_amx(p);
        });
  m.def("joint_attention_backward_amx",
        [](Address q, Address k, Address v, Address out, Address grad_out, Address lse,
           const std::array<Address, 3>& grads, const std::array<int64_t, 5>& strides,
           const std::vector<int64_t>& q_lens, const std::vector<int64_t>& k_lens, int64_t heads, int64_t head_dim) {
          const AmxAttentionBackward p{pointer(q),
                                       pointer(k),
                                       pointer(v),
                                       pointer(out),
                                       pointer(grad_out),
                                       pointer<float>(lse),
                                       pointer(grads[0]),
                                       pointer(grads[1]),
                                       pointer(grads[2]),
                                       strides[0],
                                       strides[1],
                                       strides[2],
                                       strides[3],
                                       strides[4],
                                       q_lens,
                                       k_lens,
                                       heads,
                                       head_dim};
          py::gil_scoped_release release;
          joint_attention_backward_amx(p);
        });
#endif
#if defined(QIF_CUDA_ARCHITECTURES)
  define_cuda(m);
  define_cutlass(m);
#endif
  m.def("build_info", &build_info);
  m.def("set_isa", &set_isa);
}
