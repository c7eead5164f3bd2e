#include "shapes.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

#include "layouts.h"
#include "storage.h"

namespace vgpu {

namespace {

// The bytes of everything an output's geometry may depend on.
class Key {
 public:
  // False if there is an argument that cannot be part of a key.
  bool add_all(const c10::OperatorHandle& op, const Stack& arguments) {
    add(&op.schema());
    add(at::GradMode::is_enabled());  // some kernels keep a workspace only then
    for (const auto& value : arguments)
      if (!add_value(value)) return false;
    return true;
  }
  std::string bytes;

 private:
  template <typename T>
  void add(const T& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  template <typename T>
  void add_range(const T& values) {
    add(values.size());
    for (const auto& value : values) add(value);
  }

  void add_tensor(const at::Tensor& t) {
    if (!t.defined()) {
      add('u');
      return;
    }
    add(is_vgpu(t) ? 'V' : 'C');
    add(t.scalar_type());
    add(t.unsafeGetTensorImpl()->is_wrapped_number());
    add_range(t.sizes());
    add_range(t.strides());
  }

  bool add_value(const c10::IValue& value) {
    if (value.isTensor()) {
      add_tensor(value.toTensor());
    } else if (value.isNone()) {
      add('n');
    } else if (value.isInt()) {
      add('i');
      add(value.toInt());
    } else if (value.isBool()) {
      add(value.toBool() ? 't' : 'f');
    } else if (value.isDouble()) {
      add('d');
      add(value.toDouble());
    } else if (value.isString()) {
      add('s');
      add_range(value.toStringRef());
    } else if (value.isDevice()) {
      add('D');
    } else {
      return add_list(value);
    }
    return true;
  }

  bool add_list(const c10::IValue& value) {
    if (value.isIntList()) {
      add('I');
      add_range(value.toIntVector());
    } else if (value.isDoubleList()) {
      add('F');
      add_range(value.toDoubleVector());
    } else if (value.isBoolList()) {
      add('B');
      for (bool flag : value.toBoolList()) add(flag);
      add('.');
    } else if (value.isTensorList() || value.isOptionalTensorList()) {
      add('L');
      for (const c10::IValue& element : value.toListRef())
        if (!add_value(element)) return false;
      add('.');
    } else {
      return false;
    }
    return true;
  }
};

at::Tensor to_meta(const at::Tensor& t) {
  if (!t.defined() || (!is_vgpu(t) && t.dim() == 0)) return t;
  auto meta = at::detail::empty_strided_meta(t.sizes(), t.strides(), t.scalar_type());
  if (t.unsafeGetTensorImpl()->is_wrapped_number())
    meta.unsafeGetTensorImpl()->set_wrapped_number(true);
  return meta;
}

Stack to_meta(const Stack& arguments) {
  Stack meta;
  for (const auto& value : arguments) {
    if (value.isDevice())
      meta.emplace_back(c10::Device(c10::kMeta));
    else
      meta.push_back(map_tensors(value, [](const at::Tensor& t) { return to_meta(t); }));
  }
  return meta;
}

Geometry geometry_of(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {true, c10::DimVector(t.sizes()), c10::DimVector(t.strides()), t.scalar_type()};
}

OutputPlan make_plan(const OpInfo& info, const Stack& meta_results) {
  OutputPlan plan;
  plan.results.resize(meta_results.size());
  for (size_t i = 0; i < meta_results.size(); ++i) {
    if (info.returned_argument[i] >= 0) continue;
    auto& result = plan.results[i];
    result.is_list = meta_results[i].isTensorList();
    for_each_tensor(meta_results[i], [&](const at::Tensor& t) {
      result.tensors.push_back(geometry_of(t));
      plan.all_defined &= t.defined();
    });
  }
  return plan;
}

// For each argument the geometry that an out= of another shape gets.
std::vector<Geometry> other_shapes(const OpInfo& info, const Stack& arguments,
                                   const Stack& made) {
  std::vector<Geometry> found(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!info.is_written[i] || !arguments[i].isTensor() || !made[i].isTensor()) continue;
    const auto &t = arguments[i].toTensor(), &other = made[i].toTensor();
    if (!is_vgpu(t) || !other.defined() || other.sizes().equals(t.sizes())) continue;
    found[i] = geometry_of(other);
  }
  return found;
}

void resize_outputs(const OutputPlan& plan, const Stack& arguments) {
  for (size_t i = 0; i < plan.outs.size(); ++i)
    if (plan.outs[i].is_defined)
      reshape_output(arguments[i].toTensor(), plan.outs[i].sizes, plan.outs[i].strides);
}

// Whether the strides are those of a fresh tensor, to the last dimension of size one: CPU kernels
// look at all of them when they choose a memory format.
bool has_plain_strides(const at::Tensor& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (t.stride(d) != expected) return false;
    expected *= std::max<int64_t>(t.size(d), 1);
  }
  return true;
}

// Most Meta kernels are written apart from the CPU kernels, often after CUDA's, and disagree about
// memory formats and about the type of statistics of bfloat16 and float16. Structured operators
// have one function for the geometry on all devices, but some have a formula in Python in its
// place, with other strides; and what the kernel writes into memory of other strides than its own
// is wrong without a word. So where arguments have strides of their own, the CPU kernel tells.
bool is_certain(const OpInfo& info, const OutputPlan& plan, const Stack& arguments) {
  bool makes_tensors = false, all_plain = true;
  for (const auto& result : plan.results) makes_tensors |= !result.tensors.empty();
  for (const auto& out : plan.outs) makes_tensors |= out.is_defined;
  for (const auto& value : arguments)
    for_each_tensor(value, [&](const at::Tensor& t) {
      if (!t.defined()) return;
      all_plain &= has_plain_strides(t);
      all_plain &= info.out_op || !at::isReducedFloatingType(t.scalar_type());
    });
  return !makes_tensors || all_plain;
}

bool has_same_sizes(const OutputPlan& a, const OutputPlan& b) {
  auto same = [](const Geometry& g, const Geometry& h) { return g.sizes == h.sizes; };
  if (!std::equal(a.outs.begin(), a.outs.end(), b.outs.begin(), b.outs.end(), same)) return false;
  for (size_t i = 0; i < a.results.size(); ++i) {
    const auto &x = a.results[i].tensors, &y = b.results[i].tensors;
    if (!std::equal(x.begin(), x.end(), y.begin(), y.end(), same)) return false;
  }
  return true;
}

// Plans by key.
class PlanCache {
 public:
  std::shared_ptr<const OutputPlan> find(const std::string& key) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = plans_.find(key);
    return it == plans_.end() ? nullptr : it->second;
  }
  void store(const std::string& key, std::shared_ptr<const OutputPlan> plan) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() > kMaxPlans) plans_.clear();
    plans_[key] = std::move(plan);
  }

 private:
  static constexpr size_t kMaxPlans = 100000;
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const OutputPlan>> plans_;
};

PlanCache& plan_cache() {
  static auto* cache = new PlanCache();
  return *cache;
}

}  // namespace

void reshape_output(const at::Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (t.sizes().equals(sizes)) return;
  resize_tensor(t, sizes, std::nullopt);
  auto like = at::detail::empty_strided_meta(sizes, strides, t.scalar_type());
  if (like.is_non_overlapping_and_dense())
    t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
}

std::shared_ptr<const OutputPlan> plan_outputs(const c10::OperatorHandle& op, const OpInfo& info,
                                               const Stack& arguments) {
  Key key;
  bool is_cacheable = key.add_all(op, arguments);
  if (is_cacheable)
    if (auto plan = plan_cache().find(key.bytes)) {
      resize_outputs(*plan, arguments);
      return plan;
    }
  if (info.has_wrong_meta) return nullptr;
  try {
    Stack meta_arguments = to_meta(arguments);
    Stack meta_results = meta_arguments;
    op.callBoxed(&meta_results);
    auto plan = std::make_shared<OutputPlan>(make_plan(info, meta_results));
    plan->outs = other_shapes(info, arguments, meta_arguments);
    plan->is_certain = is_certain(info, *plan, arguments);
    if (is_cacheable && plan->is_certain) plan_cache().store(key.bytes, plan);
    if (plan->is_certain) resize_outputs(*plan, arguments);
    return plan;
  } catch (const std::exception&) {
    return nullptr;  // data-dependent, no Meta kernel, or wrong arguments: the CPU kernel tells
  }
}

void remember_outputs(const c10::OperatorHandle& op, const OpInfo& info, const Stack& arguments,
                      const Stack& cpu_results, const std::vector<at::Tensor>& outs,
                      const OutputPlan* guess) {
  for (const auto& value : cpu_results) {
    bool all_dense = true;
    for_each_tensor(value, [&](const at::Tensor& t) { all_dense &= !t.defined() || is_dense(t); });
    if (!all_dense) return;  // how many elements a sparse tensor holds depends on data
  }
  auto plan = std::make_shared<OutputPlan>(make_plan(info, cpu_results));
  Stack made(outs.begin(), outs.end());
  plan->outs = other_shapes(info, arguments, made);
  if (guess && !has_same_sizes(*guess, *plan)) return;
  Key key;
  if (key.add_all(op, arguments)) plan_cache().store(key.bytes, plan);
}

}  // namespace vgpu
