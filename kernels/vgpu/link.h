// Links: the wires between host and devices, paced to a given bandwidth in each direction.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace vgpu {

enum class Direction { HostToDevice, DeviceToHost, PeerOut, PeerIn };
constexpr int kNumDirections = 4;

// Bytes that went over a link since the last reset.
uint64_t link_nbytes(int device, Direction direction);
void reset_link_counters();

struct Hop {
  int device;
  Direction direction;
};

// Copies on the calling (worker) thread, no faster than the slowest hop allows. All hops must be
// given in the same order by all callers; a copy holds none of them between chunks.
void copy_over_links(const at::Tensor& dst, const at::Tensor& src, const std::vector<Hop>& hops);

}  // namespace vgpu
