// How functions are exported that Python calls through ctypes.
#pragma once

#define VGPU_API extern "C" __attribute__((visibility("default")))
