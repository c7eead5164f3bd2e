// Device memory: a hard limit on live bytes, stream-ordered reuse, real OutOfMemoryError.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <cstddef>

namespace vgpu {

c10::DeviceAllocator& device_allocator();

// Device that owns the address, or -1.
int device_of_pointer(const void* pointer);

// Bytes of live blocks, over all devices.
size_t live_nbytes();

// Forgets all memory of all devices, so that other limits can apply. Nothing may be live.
void reset_memory();

}  // namespace vgpu
