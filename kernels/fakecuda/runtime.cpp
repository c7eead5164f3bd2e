// All of the stand-in's runtime in one translation unit.
#include "state.cpp"
#include "tracing.cpp"
#include "devices.cpp"
#include "streams.cpp"
#include "memory.cpp"
#include "launch.cpp"
