// The operators' autograd nodes in C++, for eager calls: an empty autograd.Function in Python takes half the time of the whole plain
// formula with its backward. Optional: without this extension mpvg_kernels/ops has the same in Python, with the comments on what is
// saved and returned, and why.
//
// torch's stable ABI has no autograd, so this is a Python extension for one version of torch; mpvg_kernels/backends.py loads it where
// that is the version that runs. It calls the raw operators of the backend in use through the dispatcher.
//
// A call comes here before any check. What functional._prepare would pass on as it is runs here; anything else, wrong or only out of the
// ordinary (another layout, a subclass, torch.func, a tracer or mode at work), is declined: the result is None, and Python takes over.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <map>
#include <string>

namespace mpvg {
namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;

MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

// Call an operator; what it leaves out is undefined.
template <size_t kOutputs, class... Args>
std::array<Tensor, kOutputs> call(const c10::OperatorHandle& op, const Args&... args) {
  torch::jit::Stack stack;
  stack.reserve(sizeof...(args));
  (stack.emplace_back(args), ...);
  op.callBoxed(stack);
  std::array<Tensor, kOutputs> outputs;
  for (size_t i = 0; i < kOutputs; ++i)
    if (stack[i].isTensor()) outputs[i] = std::move(stack[i]).toTensor();
  return outputs;
}

// ---- a call

struct Call {
  Tensor x, weight;
  MaybeTensor branch, branch_scale, bias, pos, pos_weight, pos_bias;
  double eps, pos_eps;
  int64_t num_prefix_tokens;
  ScalarType out_dtype;
  std::string_view backend;

  // The raw operator's results, computed below autograd and without the GIL.
  template <size_t kOutputs>
  std::array<Tensor, kOutputs> forward(const c10::OperatorHandle& op, bool save) const {
    pybind11::gil_scoped_release no_gil;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call<kOutputs>(op, x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, eps, pos_eps, num_prefix_tokens, out_dtype,
                          save);
  }
};

// The arguments in the order of ops.common.FORWARD_ARGS, with normed_pos after the tensors and the backend for `save`; false where one is
// not of the ordinary type.
bool parse(PyObject* const* args, Py_ssize_t count, Call& c) {
  if (count != 14) return false;
  std::array<MaybeTensor, 9> tensors;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (args[i] == Py_None) continue;
    if (!THPVariable_CheckExact(args[i])) return false;
    tensors[i] = THPVariable_Unpack(args[i]);
    if (tensors[i]->layout() != at::kStrided) return false;
  }
  PyObject *eps = args[9], *pos_eps = args[10], *prefix = args[11], *out_dtype = args[12];
  if (pos_eps == Py_None) pos_eps = eps;
  if (!tensors[0] || !tensors[3] || !PyFloat_CheckExact(eps) || !PyFloat_CheckExact(pos_eps) || !PyLong_CheckExact(prefix) ||
      !PyUnicode_Check(args[13]))
    return false;
  c.x = std::move(*tensors[0]), c.branch = std::move(tensors[1]), c.branch_scale = std::move(tensors[2]);
  c.weight = std::move(*tensors[3]), c.bias = std::move(tensors[4]);
  c.pos = std::move(tensors[5]), c.pos_weight = std::move(tensors[6]), c.pos_bias = std::move(tensors[7]);
  if (c.pos.has_value() != c.pos_weight.has_value() || (c.pos_bias && !c.pos)) return false;
  if (tensors[8]) {  // to the raw operators: pos without pos_weight
    if (c.pos) return false;
    c.pos = std::move(tensors[8]);
  }
  c.eps = PyFloat_AS_DOUBLE(eps), c.pos_eps = PyFloat_AS_DOUBLE(pos_eps);
  int overflow = 0;
  c.num_prefix_tokens = PyLong_AsLongLongAndOverflow(prefix, &overflow);
  c.backend = PyUnicode_AsUTF8(args[13]);
  if (THPDtype_Check(out_dtype)) {
    c.out_dtype = reinterpret_cast<THPDtype*>(out_dtype)->scalar_type;
  } else if (out_dtype == Py_None) {
    const auto device = c.x.device().type();
    c.out_dtype = c.branch ? c10::promoteTypes(c.x.scalar_type(), c.branch->scalar_type()) : c.x.scalar_type();
    if (c.out_dtype != at::kDouble && at::autocast::is_autocast_enabled(device)) c.out_dtype = at::autocast::get_autocast_dtype(device);
  } else {
    return false;
  }
  return !overflow;
}

// Whether functional._prepare would pass the call on as it is.
bool ordinary(const Call& c) {
  if (c.x.dim() != 3) return false;
  const auto x_dtype = c.x.scalar_type();
  const bool fp64 = x_dtype == at::kDouble;
  const int64_t B = c.x.size(0), N = c.x.size(1), D = c.x.size(2);

  auto a_float = [&](ScalarType t) { return t == at::kDouble ? fp64 : t == at::kFloat || t == at::kBFloat16 || t == at::kHalf; };
  auto rows = [&](const Tensor& t) { return a_float(t.scalar_type()) && (t.scalar_type() == at::kDouble) == fp64 && t.stride(2) == 1; };
  auto small = [&](const MaybeTensor& t, at::IntArrayRef sizes) {
    return !t || (t->device() == c.x.device() && t->sizes() == sizes && t->is_contiguous());
  };
  auto parameter = [&](const MaybeTensor& t, at::IntArrayRef sizes) {
    return small(t, sizes) && (!t || t->scalar_type() == x_dtype || (t->scalar_type() == at::kFloat && !fp64));
  };
  auto same_dtype = [](const MaybeTensor& bias, const Tensor& weight) { return !bias || bias->scalar_type() == weight.scalar_type(); };

  return D > 0 && rows(c.x) && (!fp64 || c.backend == "cpp") && a_float(c.out_dtype) && (c.out_dtype == at::kDouble) == fp64 &&
         (!c.branch || (c.branch->device() == c.x.device() && c.branch->sizes() == c.x.sizes() && rows(*c.branch))) &&
         (!c.branch_scale || (c.branch && small(c.branch_scale, {B}) && a_float(c.branch_scale->scalar_type()) &&
                              !c.branch_scale->requires_grad())) &&
         parameter(c.weight, {D}) && parameter(c.bias, {D}) && same_dtype(c.bias, c.weight) &&
         0 <= c.num_prefix_tokens && c.num_prefix_tokens <= N &&
         parameter(c.pos, {N - c.num_prefix_tokens, D}) &&
         parameter(c.pos_weight, {D}) && parameter(c.pos_bias, {D}) && (!c.pos_bias || same_dtype(c.pos_bias, *c.pos_weight)) &&
         c.eps >= 0 && c.pos_eps >= 0;
}

// Nothing between this thread and the kernels but autograd: no tracing, functorch, functionalisation, or mode of torch.overrides and
// torch.utils._python_dispatch; no forward-mode derivatives.
bool plain_context(const Call& c) {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  if (!(included - c10::default_included_set).empty() || at::impl::torch_function_mode_enabled()) return false;
  using torch::autograd::isFwGradDefined;
  return !(isFwGradDefined(c.x) || isFwGradDefined(c.branch) || isFwGradDefined(c.weight) || isFwGradDefined(c.bias) ||
           isFwGradDefined(c.pos) || isFwGradDefined(c.pos_weight) || isFwGradDefined(c.pos_bias));
}

// ---- nodes

// An operator's raw forward and backward on one backend.
template <class Op>
struct Raw {
  c10::OperatorHandle forward, backward;

  static const Raw& of(std::string_view backend) {  // under the GIL
    static std::map<std::string, Raw, std::less<>> found;
    auto at = found.find(backend);
    if (at == found.end()) {
      auto schema = [&](const char* direction) {
        const std::string name = std::string("mpvg::") + Op::kName + direction + std::string(backend);
        return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
      };
      at = found.emplace(backend, Raw{schema("_fwd_"), schema("_bwd_")}).first;
    }
    return at->second;
  }
};

// Shared and intrusive pointers are both in use, by torch's version.
using NodePointer = decltype(std::declval<Node&>().getptr());
template <class T, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

// torch.autograd.graph's hooks on new nodes, in versions that have them.
template <class Pointer>
auto announce(const Pointer& node, int) -> decltype(fire_node_creation_hooks(node)) {
  fire_node_creation_hooks(node);
}
template <class Pointer>
void announce(const Pointer&, long) {}

using Grads = std::array<Tensor, 7>;  // of x, branch, weight, bias, pos, pos_weight, pos_bias

// What the operators' nodes have in common. The edges are in the order of Grads, and of grad_mask's bits.
template <class Op>
struct Backward : Node {
  Backward(const Call& c, const Raw<Op>& raw)
      : Node(torch::autograd::collect_next_edges(c.x, c.branch, c.weight, c.bias, c.pos, c.pos_weight, c.pos_bias)),
        raw(raw),
        pos_eps(c.pos_eps),
        num_prefix_tokens(c.num_prefix_tokens),
        x_dtype(c.x.scalar_type()),
        branch_dtype(c.branch ? c.branch->scalar_type() : x_dtype),
        scaled(c.branch_scale) {}

  const Raw<Op>& raw;
  double pos_eps;
  int64_t num_prefix_tokens;
  ScalarType x_dtype, branch_dtype;
  bool scaled;
  std::array<SavedVariable, Op::kSaved> saved;

  std::string name() const override { return Op::kName + std::string("_backward"); }

  // An output that carries a gradient where one of the inputs that it depends on needs it.
  void output(const Tensor& t, bool differentiable = true) {
    if (differentiable && t.defined()) {
      torch::autograd::impl::set_gradient_edge(t, {getptr(), add_input_metadata(t)});
    } else {
      add_input_metadata(Node::undefined_input());
    }
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  variable_list apply(variable_list&& outputs) override {
    std::lock_guard<std::mutex> lock(mutex_);
    std::array<Tensor, Op::kSaved> tensors;
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i] = saved[i].unpack(getptr());

    // The gradient of an unscaled branch is x's own, unless it needs another dtype.
    const bool needs_x = task_should_compute_output(0), needs_branch = task_should_compute_output(1);
    const bool own = needs_branch && (scaled || x_dtype != branch_dtype);
    int64_t mask = (needs_x || (needs_branch && !own)) | own << 1;
    for (size_t i = 2; i < 7; ++i) mask |= int64_t(task_should_compute_output(i)) << i;

    variable_list grads;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [dx, dbranch, dweight, dbias, dpos, dpos_weight, dpos_bias] = Op::backward(*this, outputs, tensors, mask);
      grads = {needs_x ? dx : Tensor(), own || !needs_branch ? dbranch : dx, dweight, dbias, dpos, dpos_weight, dpos_bias};
    }
    if (at::GradMode::is_enabled()) refuse_second_derivative(grads, outputs, tensors);
    return grads;
  }

  // Under create_graph the gradients get a history whose backward is an error.
  template <class Tensors>
  static void refuse_second_derivative(const variable_list& grads, const variable_list& outputs, const Tensors& saved) {
    torch::autograd::edge_list edges;
    auto depends_on = [&](const Tensor& t) {
      if (t.defined() && t.requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(t));
    };
    std::for_each(outputs.begin(), outputs.end(), depends_on);
    std::for_each(saved.begin(), saved.end(), depends_on);
    if (edges.empty()) return;
    const auto error = make_node<torch::autograd::Error>(
        Op::kName + std::string(": double backward is not supported by the fused kernels; run the forward under "
                                "mpvg_kernels.use_backend('reference') to differentiate twice"),
        std::move(edges));
    for (const Tensor& t : grads)
      if (t.defined() && !t.requires_grad()) torch::autograd::set_history(t, error);
  }
};

Tensor dense_rows(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// ---- operators: what is saved and what is returned

struct PELayerNorm {
  static constexpr auto kName = "pe_layer_norm";
  static constexpr size_t kSaved = 6;
  using Outputs = std::array<Tensor, 3>;  // y, stream, pos'

  static bool possible(const Call&) { return true; }

  static Outputs forward(const Call& c, const Raw<PELayerNorm>& raw) {
    auto [y, h, pos_out, _] = c.forward<4>(raw.forward, false);
    return {y, h.defined() ? h : c.x, pos_out};
  }

  static Outputs forward_with_node(const Call& c, const Raw<PELayerNorm>& raw) {
    auto [y, h, pos_out, stats] = c.forward<4>(raw.forward, true);
    const auto node = make_node<Backward<PELayerNorm>>(c, raw);
    const bool stream_differentiable = node->should_compute_output({{0, 2}}), pos_differentiable = node->should_compute_output({{4, 7}});
    Tensor stream = h.defined() ? h : c.x;
    if (!h.defined() && stream_differentiable) {  // x with a history of its own
      at::AutoGradMode no_grad(false);
      stream = c.x.view_as(c.x);
    }
    node->output(y);
    node->output(stream, stream_differentiable);
    node->output(pos_out, pos_differentiable);
    node->saved = {SavedVariable(h.defined() ? h : c.x, h.defined() && stream_differentiable),
                   SavedVariable(stats, false),
                   SavedVariable(c.weight, false),
                   SavedVariable(c.branch_scale, false),
                   SavedVariable(c.pos, false),
                   SavedVariable(c.pos_weight, false)};
    announce(node, 0);
    return {y, stream, pos_out};
  }

  static Grads backward(const Backward<PELayerNorm>& node, const variable_list& outputs, const std::array<Tensor, kSaved>& saved,
                        int64_t mask) {
    const auto& [h, stats, weight, branch_scale, pos, pos_weight] = saved;
    const Tensor &dy = outputs[0], &dh = outputs[1], &dpos_out = outputs[2];
    // Only the stream or pos' was used: a zero that takes no memory stands for dy.
    const Tensor dense_dy = dy.defined() ? dense_rows(dy) : h.new_zeros({h.size(-1)}).expand(h.sizes());
    const MaybeTensor dense_dh = dh.defined() ? MaybeTensor(dense_rows(dh)) : std::nullopt;
    const MaybeTensor dense_dpos = dpos_out.defined() ? MaybeTensor(dpos_out.contiguous()) : std::nullopt;
    return call<7>(node.raw.backward, dense_dy, dense_dh, dense_dpos, h, stats, weight, maybe(branch_scale), maybe(pos), maybe(pos_weight),
                   node.pos_eps, node.num_prefix_tokens, node.x_dtype, node.branch_dtype, mask);
  }
};

struct PENormPool {
  static constexpr auto kName = "pe_norm_pool";
  static constexpr size_t kSaved = 7;
  using Outputs = std::array<Tensor, 1>;

  static bool possible(const Call& c) { return c.x.size(1) > c.num_prefix_tokens; }

  static Outputs forward(const Call& c, const Raw<PENormPool>& raw) { return {c.forward<4>(raw.forward, false)[0]}; }

  static Outputs forward_with_node(const Call& c, const Raw<PENormPool>& raw) {
    auto [out, h, stats, s] = c.forward<4>(raw.forward, true);
    const auto node = make_node<Backward<PENormPool>>(c, raw);
    node->output(out);
    node->saved = {SavedVariable(h.defined() ? h : c.x, false),
                   SavedVariable(stats, false),
                   SavedVariable(s, false),
                   SavedVariable(c.weight, false),
                   SavedVariable(c.branch_scale, false),
                   SavedVariable(c.pos, false),
                   SavedVariable(c.pos_weight, false)};
    announce(node, 0);
    return {out};
  }

  static Grads backward(const Backward<PENormPool>& node, const variable_list& outputs, const std::array<Tensor, kSaved>& saved,
                        int64_t mask) {
    const auto& [h, stats, s, weight, branch_scale, pos, pos_weight] = saved;
    const Tensor dout = outputs[0].defined() ? dense_rows(outputs[0]) : node.input_metadata(0).zeros_like();
    return call<7>(node.raw.backward, dout, h, stats, s, weight, maybe(branch_scale), maybe(pos), maybe(pos_weight), node.pos_eps,
                   node.num_prefix_tokens, node.x_dtype, node.branch_dtype, mask);
  }
};

// ---- Python

template <class Op>
typename Op::Outputs run(const Call& c, const Raw<Op>& raw) {
  using torch::autograd::compute_requires_grad;
  const bool record = compute_requires_grad(c.x, c.branch, c.weight, c.bias, c.pos, c.pos_weight, c.pos_bias);
  return record ? Op::forward_with_node(c, raw) : Op::forward(c, raw);
}

// The operator's outputs, a tensor or a tuple; None where the call is declined.
template <class Op>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call c;
  if (!parse(args, count, c) || !ordinary(c) || !Op::possible(c) || !plain_context(c)) Py_RETURN_NONE;
  const auto outputs = run(c, Raw<Op>::of(c.backend));
  if constexpr (std::tuple_size_v<typename Op::Outputs> == 1) {
    return THPVariable_Wrap(outputs[0]);
  } else {
    PyObject* tuple = PyTuple_New(outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) PyTuple_SET_ITEM(tuple, i, THPVariable_Wrap(outputs[i]));
    return tuple;
  }
  END_HANDLE_TH_ERRORS
}

template <class Op>
PyMethodDef method() {
  return {Op::kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(entry<Op>)), METH_FASTCALL,
          "The tensors in the order of ops.common.FORWARD_ARGS, normed_pos, the options in that order, and the backend's name."};
}

PyMethodDef methods[] = {method<PELayerNorm>(), method<PENormPool>(), {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_autograd", nullptr, -1, methods};

}  // namespace
}  // namespace mpvg

#define MPVG_PASTE(a, b) a##b
#define MPVG_INIT(name) MPVG_PASTE(PyInit_, name)
PyMODINIT_FUNC MPVG_INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&mpvg::module); }
