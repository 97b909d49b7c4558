#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "params.h"

namespace py = pybind11;

namespace qif {

template <class Params, class... A>
static void define(py::module_& m, const std::string& op, Params (*params)(A...),
                   int (*kernel)(const Params&, void*, void*)) {
  m.def((op + "_cuda").c_str(), [op, params, kernel](A... a, Address scratch, Address stream) {
    const Params p = params(a...);
    int error;
    {
      py::gil_scoped_release release;
      error = kernel(p, pointer(scratch), pointer(stream));
    }
    if (error) throw std::runtime_error(op + ": " + cuda_error(error));
  });
}

void define_cuda(py::module_& m) {
  define(m, "layer_norm_modulate_forward", layer_norm_modulate, layer_norm_modulate_forward_cuda);
  define(m, "layer_norm_modulate_fp8_forward", layer_norm_modulate_fp8, layer_norm_modulate_fp8_forward_cuda);
  define(m, "layer_norm_modulate_backward", layer_norm_modulate_backward, layer_norm_modulate_backward_cuda);
  define(m, "gate_residual_norm_modulate_forward", gate_residual_norm_modulate,
         gate_residual_norm_modulate_forward_cuda);
  define(m, "gate_residual_norm_modulate_fp8_forward", gate_residual_norm_modulate_fp8,
         gate_residual_norm_modulate_fp8_forward_cuda);
  define(m, "gate_residual_norm_modulate_backward", gate_residual_norm_modulate_backward,
         gate_residual_norm_modulate_backward_cuda);
  define(m, "qk_norm_rope_forward", qk_norm_rope, qk_norm_rope_forward_cuda);
  define(m, "qk_norm_rope_backward", qk_norm_rope_backward, qk_norm_rope_backward_cuda);
  define(m, "guided_step_forward", guided_step, guided_step_forward_cuda);
  define(m, "guided_step_backward", guided_step_backward, guided_step_backward_cuda);
  define(m, "gelu_tanh_forward", gelu_tanh, gelu_tanh_forward_cuda);
  define(m, "gelu_tanh_backward", gelu_tanh_backward, gelu_tanh_backward_cuda);
  define(m, "joint_attention_forward", joint_attention, joint_attention_forward_cuda);
  define(m, "joint_attention_backward", joint_attention_backward, joint_attention_backward_cuda);
  define(m, "channel_norm_silu_forward", channel_norm_silu, channel_norm_silu_forward_cuda);
  define(m, "add_channel_norm_silu_forward", add_channel_norm_silu, channel_norm_silu_forward_cuda);
  define(m, "channel_norm_silu_backward", channel_norm_silu_backward, channel_norm_silu_backward_cuda);
  define(m, "int8_rows", int8_rows, int8_rows_cuda);
  define(m, "int8_rows_fp8", int8_rows_fp8, int8_rows_cuda);
  define(m, "linear_int8", int8_products, linear_int8_cuda);
  define(m, "linear_fp8", int8_products, linear_fp8_cuda);
#if defined(QIF_CUTLASS_ALL)
  define(m, "conv2d_forward", conv2d, conv2d_forward_cuda);
#endif
  m.def("layer_norm_modulate_backward_scratch", &layer_norm_modulate_backward_scratch);
  m.def("gate_residual_norm_modulate_backward_scratch", &gate_residual_norm_modulate_backward_scratch);
  m.def("qk_norm_rope_backward_scratch", &qk_norm_rope_backward_scratch);
  m.def("channel_norm_silu_backward_scratch", &channel_norm_silu_backward_scratch);
  m.def("joint_attention_backward_scratch", &joint_attention_backward_scratch);
}

}  // namespace qif
