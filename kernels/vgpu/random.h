// Random numbers: a generator for each device that draws exactly what CPU's would.
#pragma once

#include <ATen/core/Generator.h>

#include "fallback.h"

namespace vgpu {

const at::Generator& default_generator(int device);
at::Generator make_generator(int device);

// The CPU generator to draw from: of the one given, or of the device.
at::Generator cpu_generator(const c10::IValue& value, int device);

// Runs a random operator. The numbers are drawn now, on the calling thread, so that what is drawn
// does not depend on when a stream's thread gets to run.
void run_random(const c10::OperatorHandle& op, const Stack& arguments, int device, Stack* stack);

}  // namespace vgpu
