// Recurrent networks by CPU's formulas. PyTorch's own composites ask for the device and take
// cells for anything but the CPU that exist on CUDA only and round differently. Every operator
// here is recorded by autograd, in the order in which CPU calls them: so gradients are summed in
// the same order too.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>

#include "fallback.h"

namespace vgpu {

namespace {

enum class CellKind { Lstm, Gru, Tanh, Relu };

struct CellWeights {
  at::Tensor input, hidden, input_bias, hidden_bias, projection;  // the last three may be absent
};

using State = std::vector<at::Tensor>;  // hidden, and for an LSTM the cell
using Steps = std::vector<at::Tensor>;  // one tensor for each step of time

// The settings that all of nn.LSTM, nn.GRU and nn.RNN pass.
struct Network {
  CellKind kind;
  bool has_biases;
  int64_t num_layers;
  double dropout;
  bool train, bidirectional;
  int num_directions() const { return bidirectional ? 2 : 1; }
};

at::Tensor from_input(const at::Tensor& x, const CellWeights& w) {
  return at::linear(x, w.input, w.input_bias);
}
at::Tensor from_hidden(const State& state, const CellWeights& w) {
  return at::linear(state[0], w.hidden, w.hidden_bias);
}

// One step. `x` went through from_input() before if `is_ready`: CPU does that for all steps at
// once where it has them all.
State step(CellKind kind, const at::Tensor& x, bool is_ready, const State& state,
           const CellWeights& w) {
  if (kind == CellKind::Gru) {
    auto in = (is_ready ? x : from_input(x, w)).unsafe_chunk(3, 1);
    auto hidden = from_hidden(state, w).unsafe_chunk(3, 1);
    auto reset = hidden[0].add_(in[0]).sigmoid_();
    auto update = hidden[1].add_(in[1]).sigmoid_();
    auto fresh = in[2].add(hidden[2].mul_(reset)).tanh_();
    return {(state[0] - fresh).mul_(update).add_(fresh)};
  }
  auto gates = from_hidden(state, w);
  gates.add_(is_ready ? x : from_input(x, w));
  if (kind == CellKind::Tanh) return {at::tanh(gates)};
  if (kind == CellKind::Relu) return {at::relu(gates)};
  auto chunks = gates.unsafe_chunk(4, 1);
  auto in = chunks[0].sigmoid_();
  auto forget = chunks[1].sigmoid_();
  auto candidate = chunks[2].tanh_();
  auto out = chunks[3].sigmoid_();
  auto cell = forget * state[1];
  cell.add_(in * candidate);
  auto hidden = out * cell.tanh();
  if (w.projection.defined()) hidden = at::matmul(hidden, w.projection.t());
  return {hidden, cell};
}

State slice(const State& state, int64_t begin, int64_t end) {
  State part;
  for (const auto& t : state) part.push_back(t.narrow(0, begin, end - begin));
  return part;
}

State concatenate(const std::vector<State>& states) {
  State whole;
  for (size_t i = 0; i < states[0].size(); ++i) {
    std::vector<at::Tensor> parts;
    for (const auto& state : states) parts.push_back(state[i]);
    whole.push_back(at::cat(parts, 0));
  }
  return whole;
}

// One direction of one layer over a sequence of equal lengths: (time, batch, features).
at::Tensor run_padded(CellKind kind, const at::Tensor& input, State& state, const CellWeights& w,
                      bool reverse) {
  Steps inputs = from_input(input, w).unbind(0);
  TORCH_CHECK(!inputs.empty(), "Expected sequence length to be larger than 0 in RNN");
  Steps outputs;
  if (reverse) std::reverse(inputs.begin(), inputs.end());
  for (const auto& x : inputs) {
    state = step(kind, x, true, state, w);
    outputs.push_back(state[0]);
  }
  if (reverse) std::reverse(outputs.begin(), outputs.end());
  return at::stack(outputs, 0);
}

// The same over packed sequences: step i is the next batch_sizes[i] rows, and sequences, longest
// first, leave the batch as they end.
at::Tensor run_packed(CellKind kind, const at::Tensor& input, at::IntArrayRef batch_sizes,
                      State& state, const CellWeights& w) {
  auto ready = from_input(input, w);
  Steps outputs;
  std::vector<State> ended;
  int64_t offset = 0, last = batch_sizes[0];
  for (int64_t size : batch_sizes) {
    auto x = ready.narrow(0, offset, size);
    offset += size;
    if (size < last) {
      ended.push_back(slice(state, size, last));
      state = slice(state, 0, size);
    }
    last = size;
    state = step(kind, x, true, state, w);
    outputs.push_back(state[0]);
  }
  ended.push_back(state);
  std::reverse(ended.begin(), ended.end());
  state = concatenate(ended);
  return at::cat(outputs, 0);
}

// Backwards in time, sequences join the batch at their last step.
at::Tensor run_packed_reverse(CellKind kind, const at::Tensor& input,
                              at::IntArrayRef batch_sizes, State& state, const CellWeights& w) {
  auto ready = from_input(input, w);
  Steps outputs;
  State initial = state;
  int64_t offset = input.size(0), last = batch_sizes.back();
  state = slice(initial, 0, last);
  for (auto it = batch_sizes.rbegin(); it != batch_sizes.rend(); ++it) {
    if (*it > last) state = concatenate({state, slice(initial, last, *it)});
    offset -= *it;
    last = *it;
    state = step(kind, ready.narrow(0, offset, *it), true, state, w);
    outputs.push_back(state[0]);
  }
  std::reverse(outputs.begin(), outputs.end());
  return at::cat(outputs, 0);
}

std::vector<CellWeights> group_weights(at::TensorList flat, bool has_biases,
                                       bool has_projections) {
  size_t each = 2 + 2 * has_biases + has_projections;
  TORCH_CHECK(flat.size() % each == 0, "got an incorrect number of RNN parameters");
  std::vector<CellWeights> cells;
  for (size_t i = 0; i < flat.size(); i += each) {
    CellWeights w{flat[i], flat[i + 1], {}, {}, {}};
    if (has_biases) w.input_bias = flat[i + 2], w.hidden_bias = flat[i + 3];
    if (has_projections) w.projection = flat[i + each - 1];
    cells.push_back(w);
  }
  return cells;
}

// Runs layer upon layer. `run(input, state, weights, reverse)` runs one direction of one layer
// and leaves the last state in `state`. Returns the output and the stacked last states.
template <typename Run>
std::pair<at::Tensor, State> run_layers(const Network& net, at::Tensor input,
                                        const std::vector<State>& initial,
                                        const std::vector<CellWeights>& weights, Run run) {
  size_t num_runs = net.num_layers * net.num_directions();
  TORCH_CHECK(num_runs == initial.size(), "Expected more hidden states in stacked_rnn");
  TORCH_CHECK(num_runs == weights.size(), "Expected more weights in stacked_rnn");
  std::vector<State> states = initial;
  for (int64_t layer = 0; layer < net.num_layers; ++layer) {
    std::vector<at::Tensor> outputs;
    for (int direction = 0; direction < net.num_directions(); ++direction) {
      size_t i = layer * net.num_directions() + direction;
      outputs.push_back(run(input, states[i], weights[i], direction == 1));
    }
    input = outputs.size() == 1 ? outputs[0] : at::cat(outputs, -1);
    if (net.dropout != 0 && net.train && layer < net.num_layers - 1)
      input = at::dropout(input, net.dropout, true);
  }
  State last;
  for (size_t i = 0; i < states[0].size(); ++i) {
    std::vector<at::Tensor> parts;
    for (const auto& state : states) parts.push_back(state[i]);
    last.push_back(at::stack(parts, 0));
  }
  return {input, last};
}

// (layers * directions, batch, features), one tensor or two -> a state for each layer, direction.
std::vector<State> split_states(at::TensorList stacked) {
  std::vector<State> states(stacked[0].size(0));
  for (const auto& t : stacked) {
    auto each = t.unbind(0);
    TORCH_CHECK(each.size() == states.size(), "hidden states of an RNN differ in their number");
    for (size_t i = 0; i < each.size(); ++i) states[i].push_back(each[i]);
  }
  return states;
}

bool is_supported_by_onednn(const char* what) {
  auto op = c10::Dispatcher::singleton().findSchema({what, ""});
  if (!op) return false;
  Stack stack;
  op->callBoxed(&stack);
  return stack[0].toBool();
}

// Whether CPU would take oneDNN's LSTM for such an input.
bool takes_onednn(const at::Tensor& input, at::TensorList states) {
  if (!at::hasMKLDNN() || !at::globalContext().userEnabledMkldnn()) return false;
  if (states[0].size(2) != states[1].size(2) || input.numel() == 0) return false;
  static const bool has_bfloat16 = is_supported_by_onednn("mkldnn::_is_mkldnn_bf16_supported");
  static const bool has_float16 = is_supported_by_onednn("mkldnn::_is_mkldnn_fp16_supported");
  switch (input.scalar_type()) {
    case at::kFloat: return true;
    case at::kBFloat16: return has_bfloat16;
    case at::kHalf: return has_float16 && !at::GradMode::is_enabled();
    default: return false;
  }
}

std::pair<at::Tensor, State> run_onednn(const Network& net, const at::Tensor& input,
                                        at::TensorList states,
                                        const std::vector<CellWeights>& weights,
                                        bool batch_first) {
  constexpr int64_t kLstm = 2;  // in oneDNN's count of kinds
  auto hidden = states[0].contiguous(), cell = states[1].contiguous();
  std::vector<State> initial;
  for (int64_t i = 0; i < hidden.size(0); ++i) initial.push_back({hidden[i], cell[i]});
  auto run = [&](const at::Tensor& x, State& state, const CellWeights& w, bool reverse) {
    auto bias = [&](const at::Tensor& given, const at::Tensor& like) {
      return net.has_biases ? given : at::zeros(like.sizes(), like.options());
    };
    auto [output, last_hidden, last_cell, workspace] = at::mkldnn_rnn_layer(
        x, w.input, w.hidden, bias(w.input_bias, w.input), bias(w.hidden_bias, w.hidden),
        state[0], state[1], reverse, {}, kLstm, hidden.size(2), net.num_layers, net.has_biases,
        net.bidirectional, batch_first, net.train);
    state = {last_hidden, last_cell};
    return output;
  };
  return run_layers(net, input.contiguous(), initial, weights, run);
}

std::pair<at::Tensor, State> run_network(const Network& net, const at::Tensor& given,
                                         at::TensorList states, at::TensorList params,
                                         bool batch_first) {
  TORCH_CHECK(states[0].dim() == 3,
              "For batched 3-D input, the hidden state should be 3-D but got ", states[0].dim(),
              "-D");
  bool is_lstm = net.kind == CellKind::Lstm;
  bool has_projections = is_lstm && states[0].size(2) != states[1].size(2);
  auto weights = group_weights(params, net.has_biases, has_projections);
  auto input = batch_first ? given.transpose(0, 1) : given;
  auto run = [&](const at::Tensor& x, State& state, const CellWeights& w, bool reverse) {
    return run_padded(net.kind, x, state, w, reverse);
  };
  auto result = is_lstm && takes_onednn(given, states)
                    ? run_onednn(net, input, states, weights, batch_first)
                    : run_layers(net, input, split_states(states), weights, run);
  if (batch_first) result.first = result.first.transpose(0, 1);
  return result;
}

std::pair<at::Tensor, State> run_packed_network(const Network& net, const at::Tensor& data,
                                                const at::Tensor& batch_sizes,
                                                at::TensorList states, at::TensorList params) {
  TORCH_CHECK(batch_sizes.device().is_cpu(),
              "batch_sizes of a packed sequence should always be on CPU. Instances of "
              "PackedSequence should never be created manually.");
  auto sizes = batch_sizes.contiguous();
  at::IntArrayRef size_of(sizes.const_data_ptr<int64_t>(), sizes.numel());
  bool has_projections =
      net.kind == CellKind::Lstm && states[0].size(2) != states[1].size(2);
  auto weights = group_weights(params, net.has_biases, has_projections);
  bool all_equal = std::all_of(size_of.begin(), size_of.end(),
                               [&](int64_t size) { return size == size_of[0]; });
  if (net.kind == CellKind::Lstm && all_equal && takes_onednn(data, states)) {
    // CPU unpacks a sequence whose lengths are all equal, for oneDNN.
    auto padded = data.view({static_cast<int64_t>(size_of.size()), size_of[0], data.size(1)});
    auto result = run_onednn(net, padded, states, weights, false);
    result.first = result.first.reshape({data.size(0), result.first.size(2)});
    return result;
  }
  auto run = [&](const at::Tensor& x, State& state, const CellWeights& w, bool reverse) {
    return reverse ? run_packed_reverse(net.kind, x, size_of, state, w)
                   : run_packed(net.kind, x, size_of, state, w);
  };
  return run_layers(net, data, split_states(states), weights, run);
}

// ---- what PyTorch calls

using Lstm = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Single = std::tuple<at::Tensor, at::Tensor>;
using OptTensor = std::optional<at::Tensor>;

Lstm lstm_input(const at::Tensor& input, at::TensorList states, at::TensorList params,
                bool has_biases, int64_t num_layers, double dropout, bool train,
                bool bidirectional, bool batch_first) {
  TORCH_CHECK(states.size() == 2, "lstm expects two hidden states");
  Network net{CellKind::Lstm, has_biases, num_layers, dropout, train, bidirectional};
  auto [output, last] = run_network(net, input, states, params, batch_first);
  return {output, last[0], last[1]};
}

Lstm lstm_data(const at::Tensor& data, const at::Tensor& batch_sizes, at::TensorList states,
               at::TensorList params, bool has_biases, int64_t num_layers, double dropout,
               bool train, bool bidirectional) {
  TORCH_CHECK(states.size() == 2, "lstm expects two hidden states");
  Network net{CellKind::Lstm, has_biases, num_layers, dropout, train, bidirectional};
  auto [output, last] = run_packed_network(net, data, batch_sizes, states, params);
  return {output, last[0], last[1]};
}

template <CellKind kind>
Single rnn_input(const at::Tensor& input, const at::Tensor& state, at::TensorList params,
                 bool has_biases, int64_t num_layers, double dropout, bool train,
                 bool bidirectional, bool batch_first) {
  Network net{kind, has_biases, num_layers, dropout, train, bidirectional};
  auto [output, last] = run_network(net, input, state, params, batch_first);
  return {output, last[0]};
}

template <CellKind kind>
Single rnn_data(const at::Tensor& data, const at::Tensor& batch_sizes, const at::Tensor& state,
                at::TensorList params, bool has_biases, int64_t num_layers, double dropout,
                bool train, bool bidirectional) {
  Network net{kind, has_biases, num_layers, dropout, train, bidirectional};
  auto [output, last] = run_packed_network(net, data, batch_sizes, state, params);
  return {output, last[0]};
}

template <CellKind kind>
State run_cell(const at::Tensor& input, at::TensorList states, const at::Tensor& w_input,
               const at::Tensor& w_hidden, const OptTensor& b_input, const OptTensor& b_hidden) {
  CellWeights w{w_input, w_hidden, b_input.value_or(at::Tensor()),
                b_hidden.value_or(at::Tensor()), {}};
  return step(kind, input, false, states.vec(), w);
}

Single lstm_cell(const at::Tensor& input, at::TensorList states, const at::Tensor& w_input,
                 const at::Tensor& w_hidden, const OptTensor& b_input, const OptTensor& b_hidden) {
  TORCH_CHECK(states.size() == 2, "lstm_cell expects two hidden states");
  auto last = run_cell<CellKind::Lstm>(input, states, w_input, w_hidden, b_input, b_hidden);
  return {last[0], last[1]};
}

at::Tensor gru_cell(const at::Tensor& input, const at::Tensor& state, const at::Tensor& w_input,
                    const at::Tensor& w_hidden, const OptTensor& b_input,
                    const OptTensor& b_hidden) {
  return run_cell<CellKind::Gru>(input, state, w_input, w_hidden, b_input, b_hidden)[0];
}

void register_rnn(torch::Library& m) {
  m.impl("lstm.input", lstm_input);
  m.impl("lstm.data", lstm_data);
  m.impl("gru.input", rnn_input<CellKind::Gru>);
  m.impl("gru.data", rnn_data<CellKind::Gru>);
  m.impl("rnn_tanh.input", rnn_input<CellKind::Tanh>);
  m.impl("rnn_tanh.data", rnn_data<CellKind::Tanh>);
  m.impl("rnn_relu.input", rnn_input<CellKind::Relu>);
  m.impl("rnn_relu.data", rnn_data<CellKind::Relu>);
  m.impl("lstm_cell", lstm_cell);
  m.impl("gru_cell", gru_cell);
}

}  // namespace

#ifndef VGPU_DEVICE_TYPE  // the stand-in for CUDA registers them when it is installed
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { register_rnn(m); }
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { register_rnn(m); }
#endif
}  // namespace vgpu
