// What the fallback needs to know about an operator, derived from its schema.
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "fallback.h"

namespace vgpu {

namespace {

// Operators whose Meta kernel disagrees with the CPU kernel about the output, though it depends
// on the geometry of the arguments only: the first run of each geometry tells.
const std::unordered_set<std::string> kWrongMeta = {
    "aten::_embedding_bag", "aten::_embedding_bag_backward", "aten::_embedding_bag_forward_only",
    "aten::_fft_c2r", "aten::_fft_r2c", "aten::_linalg_svd", "aten::_native_batch_norm_legit",
    "aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd",
    "aten::huber_loss", "aten::linalg_eig", "aten::linalg_lstsq", "aten::max_unpool2d",
    "aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward", "aten::mse_loss",
    "aten::multilabel_margin_loss_forward", "aten::native_batch_norm",
    "aten::native_batch_norm.out", "aten::native_batch_norm_backward", "aten::nonzero_static",
    "aten::smooth_l1_loss",
};

// Random operators that write every element of one tensor and read none.
const std::unordered_set<std::string> kFills = {
    "aten::uniform_", "aten::normal_", "aten::exponential_", "aten::cauchy_",
    "aten::log_normal_", "aten::geometric_", "aten::random_", "aten::random_.from",
    "aten::random_.to", "aten::bernoulli_.float", "aten::randperm.generator_out",
};

// Besides tensors of no dimension, which any operator takes, CUDA accepts host tensors only here.
bool may_take_host_tensors(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::_ctc_loss.Tensor", "aten::_ctc_loss_backward.Tensor", "aten::_pack_padded_sequence",
      "aten::repeat_interleave.Tensor", "aten::_embedding_bag", "aten::resize_as_",
  };
  return name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0 ||
         name.rfind("aten::_unsafe_index", 0) == 0 || names.count(name) > 0;
}

const std::vector<c10::OperatorHandle>& overloads_with_outputs(const std::string& base_name) {
  using Table = std::unordered_map<std::string, std::vector<c10::OperatorHandle>>;
  static const auto* table = [] {
    auto* all = new Table();
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& name : dispatcher.getAllOpNames()) {
      auto op = dispatcher.findSchema(name);
      if (!op || name.name.rfind("aten::", 0) != 0) continue;
      // Without a CPU kernel it is generated: the functional operator, then a copy.
      if (!op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
      const auto& arguments = op->schema().arguments();
      if (!arguments.empty() && arguments.back().is_out()) (*all)[name.name].push_back(*op);
    }
    return all;
  }();
  static const std::vector<c10::OperatorHandle> none;
  auto it = table->find(base_name);
  return it == table->end() ? none : it->second;
}

// Matches the arguments of `out_schema` with those of `schema`; false if they do not agree.
bool match_out_variant(const c10::FunctionSchema& schema, const c10::FunctionSchema& out_schema,
                       std::vector<int>& order) {
  size_t num_outputs = 0;
  order.clear();
  for (const auto& argument : out_schema.arguments()) {
    if (argument.is_out()) {
      if (!argument.type()->isSubtypeOf(*c10::TensorType::get())) return false;
      order.push_back(-1 - static_cast<int>(num_outputs++));
      continue;
    }
    auto index = schema.argumentIndexWithName(argument.name());
    if (!index || *schema.arguments()[*index].type() != *argument.type()) return false;
    order.push_back(*index);
  }
  return num_outputs == schema.returns().size() &&
         order.size() == num_outputs + schema.arguments().size();
}

// Only structured operators, which are one kernel for both variants: it gets its output in the
// shape the Meta kernel said. Others may resize the output or use it for intermediate results.
void find_out_variant(const c10::OperatorHandle& op, OpInfo& info) {
  const auto& schema = op.schema();
  if (info.has_wrong_meta) return;  // nor would the kernel accept what it returned
  if (!op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional))
    return;
  for (const auto& result : schema.returns())
    if (!result.type()->isSubtypeOf(*c10::TensorType::get()) || result.alias_info()) return;
  for (bool written : info.is_written)
    if (written) return;
  for (const auto& candidate : overloads_with_outputs(schema.name()))
    if (match_out_variant(schema, candidate.schema(), info.out_order)) {
      info.out_op = candidate;
      return;
    }
}

int find_returned_argument(const c10::FunctionSchema& schema, const c10::AliasInfo& alias) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* other = schema.arguments()[i].alias_info();
    if (other && other->isWrite() && other->afterSets() == alias.afterSets())
      return static_cast<int>(i);
  }
  return -1;
}

OpInfo make_info(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  OpInfo info;
  info.name = schema.name();
  if (!schema.overload_name().empty()) info.name += "." + schema.overload_name();
  for (const auto& argument : schema.arguments()) {
    const auto* alias = argument.alias_info();
    info.is_written.push_back(alias && alias->isWrite());
    info.is_out.push_back(argument.is_out());
    if (argument.name() == "generator") info.is_random = true;
  }
  for (const auto& result : schema.returns()) {
    const auto* alias = result.alias_info();
    bool is_tensor = result.type()->isSubtypeOf(*c10::TensorType::get()) ||
                     result.type()->isSubtypeOf(*c10::ListType::ofTensors());
    info.must_measure |= !is_tensor;  // a number on the host: the data must be there
    info.is_view |= alias && !alias->isWrite();
    info.returned_argument.push_back(
        alias && alias->isWrite() ? find_returned_argument(schema, *alias) : -1);
  }
  info.is_fill = kFills.count(info.name) > 0;
  info.has_wrong_meta = kWrongMeta.count(info.name) > 0;
  info.takes_host_tensors = may_take_host_tensors(info.name);
  find_out_variant(op, info);
  return info;
}

}  // namespace

const OpInfo& op_info(const c10::OperatorHandle& op) {
  static auto* infos = new std::unordered_map<const c10::FunctionSchema*, OpInfo>();
  static auto* mutex = new std::mutex();
  std::lock_guard<std::mutex> lock(*mutex);
  auto it = infos->find(&op.schema());
  if (it == infos->end()) it = infos->emplace(&op.schema(), make_info(op)).first;
  return it->second;
}

}  // namespace vgpu
