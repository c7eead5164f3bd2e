// Pinned host memory: allocated here or registered by the user; reuse waits for its copies.
#pragma once

#include <ATen/core/CachingHostAllocator.h>

#include <cstddef>
#include <string>

#include "stream.h"

namespace vgpu {

at::HostAllocator& pinned_allocator();
bool is_pinned(const void* pointer);

// Remembers that `stream` uses the pinned memory at `pointer` up to its current position.
bool record_pinned_use(const void* pointer, VStream& stream);

// Like cudaHostRegister: makes copies from and to an existing range asynchronous. Returns an
// error message, empty on success. The range must stay mapped until it is unregistered.
std::string host_register(char* pointer, size_t nbytes);
std::string host_unregister(char* pointer);

}  // namespace vgpu
